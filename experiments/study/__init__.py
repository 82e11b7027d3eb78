"""What a router's gradient buys: small decoders of equal active parameters, trained alike.

`texts` fetches the bigger mix, `records` keeps what a run measured, `page` tells and draws it, and
the command trains what is missing.
"""
