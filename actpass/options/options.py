"""All options of one compilation as one frozen value."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from actpass.codecs import LEARNED
from actpass.options.tensor_options import EXACT, TensorOptions
from actpass.plan.policies import POLICIES
from actpass.plan.request import AUTO
from actpass.plan.sensitivity import Sensitivities
from actpass.plan_file import ModelPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the user can set, checked. Picklable and comparable: it is part of the compile cache's key.

    memory_budget: a fraction of saved bytes (float), bytes of peak (int), or None. follows_global_budget: whether the options
    named none, so that it is the global one's. sensitivities: what a budget weighs errors by. plan: what to follow in place of
    a policy. weight_gradient_format: ``dense`` or ``low_rank``. residual_energies: of the learned subspaces that there are
    when a region is compiled, by the path of their parameter. resample: ``auto``, ``every_step`` or ``every_refresh``.
    fallback: ``error`` or ``warn``. optimizer_state_bytes: of an optimizer that is not known; None: AdamW's.
    """

    tensor_options: TensorOptions = field(default_factory=TensorOptions)
    module_overrides: tuple[tuple[str, TensorOptions], ...] = ()
    memory_budget: float | int | None = None
    follows_global_budget: bool = False
    refresh_interval: int | None = None
    resample: str = AUTO
    seed: int = 0
    skip_unprofitable: bool = True
    min_tensor_bytes: int = 16384
    chunked_loss: bool | int = True
    defer_logits: bool = True
    infer_masks: bool = True
    sensitivities: Sensitivities | None = None
    mode: str | None = None
    inductor_options: tuple[tuple[str, Any], ...] = ()
    plan: ModelPlan | None = None
    residual_energies: tuple[tuple[str, float], ...] = ()
    weight_gradient_format: str = "dense"
    fallback: str = "error"
    optimizer_state_bytes: int | None = None

    @property
    def defers_logits(self) -> bool:
        """Whether logits that are returned may be computed when they are read: where the loss may be chunked."""
        chunks = bool(self.chunked_loss) and self.memory_budget != 1.0
        return self.defer_logits and (chunks if self.plan is None else any(r.chunk_rows for r in self.plan.regions))

    @property
    def infers_masks(self) -> bool:
        """Whether attention masks may be left out. A budget of 1.0 asks for Inductor's own step."""
        return self.infer_masks and self.memory_budget != 1.0

    @property
    def keeps_low_rank_gradients(self) -> bool:
        """Whether weight gradients stay in their factors where they can."""
        if self.plan is not None:
            return any(r.low_rank_gradients for r in self.plan.regions)
        return self.weight_gradient_format == "low_rank"

    @property
    def resamples_every_step(self) -> bool:
        """Whether the random part of a learned basis is another at each step. Moments of coefficients want one that stays."""
        return self.resample == "every_step" or (self.resample == AUTO and not self.keeps_low_rank_gradients)

    @property
    def needs_seed(self) -> bool:
        """Whether any tensor may need random numbers, and so whether the region takes the step's seed as an input."""
        return self.plan.seeded if self.plan is not None else any(t.draws for t in self._all_tensor_options())

    @property
    def ranks_from_budget(self) -> bool:
        """Whether any rank is chosen from the budget. Then the ranks meet it, and nothing is recomputed."""
        return any(t.ranks_from_budget for t in self._all_tensor_options())

    @property
    def searches(self) -> bool:
        """Whether what is stored, and how, is searched for within a budget."""
        return self.plan is None and self.memory_budget not in (None, 1.0)

    @property
    def learned(self) -> tuple[str, ...]:
        """The learned projections that any tensor may get."""
        if self.plan is not None:
            names = {d.projection for r in self.plan.regions for d in r.projections}
        else:
            names = {t.projection for t in self._all_tensor_options()}
        return tuple(sorted(name for name in names if name is not None and name in LEARNED))

    @property
    def projects(self) -> bool:
        """Whether any weight gradient may be formed through a projection."""
        return any(t.projection is not None for t in self._all_tensor_options())

    @property
    def contracts_codes(self) -> bool:
        """Whether any weight gradient may be a matmul of codes."""
        return any(t.wgrad is not None for t in self._all_tensor_options())

    @property
    def projects_activations(self) -> bool:
        """Whether any tensor may be stored as a projection for other uses than weight gradients."""
        return any(t.projects_activations for t in self._all_tensor_options())

    @property
    def recomputes(self) -> bool:
        """Whether a policy may have something recomputed without a budget."""
        return any(POLICIES[t.decided_by].recomputes for t in self._all_tensor_options())

    @property
    def stores_exactly(self) -> bool:
        """Whether all that is stored is stored as it is."""
        if self.plan is not None:
            return not any(r.coded or r.rewrites for r in self.plan.regions)
        return all(t.stores_exactly and t.projection is None and t.wgrad is None for t in self._all_tensor_options())

    def _all_tensor_options(self) -> Iterator[TensorOptions]:
        yield self.tensor_options
        yield from (t for _, t in self.module_overrides)

    def draw_at(self, step: int) -> int:
        """Which draw of random numbers an optimizer step sees: a new one with each seeded basis."""
        return step // (self.refresh_interval or 1)

    def sketches_at(self, projection: str, step: int) -> bool:
        """Whether a learned subspace is shown a sketch in an optimizer step."""
        return step % (self.refresh_interval or LEARNED[projection].refresh_interval) == 0

    def learned_draw_at(self, step: int) -> int:
        """As `draw_at`, for the random part of learned bases (the complement of `prac`, which directions `sampled` has): drawn
        at each step, or as long as the bases stay, which is until the step after a sketch."""
        if self.resamples_every_step:
            return step
        interval = self.refresh_interval or min(
            (LEARNED[m].refresh_interval for m in self.learned if LEARNED[m].draws), default=1
        )
        return (step + interval - 1) // interval

    def tensor_options_of(self, paths: tuple[str, ...]) -> tuple[TensorOptions, str | None]:
        """The options for a parameter known under ``paths``, and the override pattern that decided, if any.

        The last matching pattern wins, as later rules refine earlier ones.
        """
        for pattern, options in reversed(self.module_overrides):
            if any(matches(pattern, path) for path in paths):
                return options, pattern
        return self.tensor_options, None

    def tensor_options_of_any(self, paths: tuple[str, ...]) -> TensorOptions:
        return self.tensor_options_of(paths)[0]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def exactly(config: Config) -> Config:
    """``config`` with everything stored as it is, and no budget."""
    return replace(config, tensor_options=TensorOptions(policy=EXACT), module_overrides=(), memory_budget=None, plan=None)


def matches(pattern: str, path: str) -> bool:
    """Whether a module-path pattern names ``path``, a module above it, or the tail of either.

    ``layers.*.mlp`` matches ``model.layers.3.mlp.gate_proj``; ``lm_head`` matches ``model.lm_head``.
    """
    return any(fnmatch.fnmatchcase(path, p) for p in (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*"))
