"""The families that convert from and to Hugging Face, by our name and by theirs."""

from moejax.convert import bert, llama, mixtral, olmoe, opt, phimoe, qwen, switch, t5
from moejax.convert.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        switch.FAMILY, t5.FAMILY, *phimoe.FAMILIES, mixtral.FAMILY, olmoe.FAMILY, *qwen.FAMILIES,
        *llama.FAMILIES, opt.FAMILY, bert.FAMILY,
    )
}
BY_MODEL_TYPE: dict[str, Family] = {
    kind: family for family in reversed(FAMILIES.values()) for kind in family.model_types
}
