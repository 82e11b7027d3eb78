"""skip_second(...): a token leaves out a second expert that hardly counts (NAEE, 2402.14800)."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from moejax.compress import base, fewer, parts, stats, stats_core
from moejax.config import ModelConfig
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipSecond(base.Transform):
  """Sets `moe.skip`; make one with `skip_second`."""

  share: float | None

  @property
  def name(self) -> str:
    return 'skip_second'

  @property
  def takes_split(self) -> bool:
    return False

  def statistics(self) -> tuple[str, ...]:
    return ('routing',) if self.share is None else ()

  def accepts(self, path: str, leaf: Any) -> None:
    """Any weight: none is changed."""

  def plan(
      self, config: ModelConfig, source: base.LeafSource, statistics: stats.Statistics | None
  ) -> Mapping[str, Any]:
    moe: Any = config.moe
    if moe.top_k != 2:
      raise UserError(f'skip_second is for routers that choose two experts; top_k = {moe.top_k}')
    if self.share is not None:
      return dict.fromkeys(fewer.experts_held(config), self.share)
    assert statistics is not None
    return {
        path: stats_core.median_ratio(statistics.of(path)['gate_ratio'])
        for path in fewer.experts_held(config)
    }

  def foreseen(self, config: ModelConfig) -> Mapping[str, Any]:
    return dict.fromkeys(fewer.experts_held(config), self.share or 0.0)

  def reconfigure(self, config: ModelConfig, plan: Mapping[str, Any]) -> ModelConfig:
    moe: Any = config.moe
    return dataclasses.replace(config, moe=dataclasses.replace(moe, skip=tuple(plan.values())))

  def predict_layer(
      self, config: ModelConfig, path: str, leaves: Mapping[str, Any], zero_share: Any
  ) -> dict[str, Any]:
    return dict(leaves)

  def layer(
      self, plan: Mapping[str, Any], path: str, source: base.LeafSource,
      context: base.LayerContext,
  ) -> Iterator[parts.Group]:
    # The router as it was: tokens go another way behind it.
    beside = fewer.layer_leaves(source, path, ('router/kernel',))
    row = {'path': f'{path}/experts', 'transform': self.name, 'skip': plan[path]}
    yield context.group((), lambda: parts.Group(experts=(), parts={}, rows=[row], leaves=beside))


def skip_second(share: float | None = None) -> SkipSecond:
  """Tokens skip their second expert where its gate is below `share` of the first's.

  The first takes over the gate. For top-2 routers; the weights stay as they are.

  Args:
    share: None for each layer's median ratio over the calibration, so that half of the tokens skip.
  """
  if share is not None and not 0 <= share < 1:
    raise UserError(f'share = {share}: in [0, 1)')
  return SkipSecond(share=share)
