"""Settings of unlearning by training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...errors import RemaskError
from ..objectives import METHODS, Method
from ..objectives.base import Options
from ..states import Noise
from ..trainer import Tails

if TYPE_CHECKING:
    from typing_extensions import Self

RetainTerm = Literal["default", "mask-loss", "kl", "hidden", "none"]


class UnlearnConfig(BaseModel):
    """Settings of a run; the methods' own are in `options`."""

    model_config = ConfigDict(extra="forbid")

    method: str
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own; the rest are its defaults")
    seed: int = 0
    steps: int = Field(default=100, gt=0)
    batch_size: int = Field(default=8, gt=0, description="forget rows a step over all processes, and as many retain rows")
    parts: int = Field(
        default=1,
        gt=0,
        description="pieces that a process's share of a batch is worked in, one backward pass each: less memory, the same step",
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps; then cosine to zero")
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    rank: int = Field(default=8, ge=0, description="of the adapters; 0 trains the weights themselves")
    targets: tuple[str, ...] | None = Field(
        default=None, description="linear layers and experts to train, see find_targets; by default all, at rank 0 all weights"
    )
    retain: RetainTerm = Field(default="default", description="term on retain rows; default is the method's")
    retain_weight: float = Field(default=1.0, ge=0)
    noise: Noise = Field(default_factory=Noise, description="of forget rows; draws are the method's unless given")
    retain_noise: Noise = Field(default_factory=lambda: Noise(law="fixed-count"), description="of retain rows")
    tails: Tails = Field(
        default=(0.4, 0.4, 0.2),
        description="shares of steps with no end tokens behind the answer, with a few, and with as many as fill gen_length",
    )
    refusal: str = Field(default="I don't know.", min_length=1, description="answer that dpo and idk prefer")
    evaluate_every: int = Field(default=25, gt=0, description="steps between points of the validation curve")
    early_stop: float | None = Field(
        default=None, gt=0, description="nats a validation row may lose; the run stops there and goes back to the point before"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute blocks in the backward pass to save memory")
    checkpoint_every: int = Field(default=100, gt=0, description="steps between checkpoints")
    shard: bool = Field(
        default=False, description="split the weights over the processes (FSDP2); the model stays split behind the run"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of the forward pass; auto is bf16 autocast where that is fast"
    )

    @model_validator(mode="after")
    def _resolved(self) -> Self:
        """Options and draws with the method's defaults filled in, so that the settings of a run are all in the file."""
        if self.method not in METHODS:
            raise RemaskError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        self.options = self.parsed.model_dump(mode="json")
        if "draws" not in self.noise.model_fields_set:
            self.noise = self.noise.model_copy(update={"draws": self.definition.draws})
        if self.definition.needs_retain and self.retain == "none":
            raise RemaskError(f"{self.method} is made of its retain term; leave retain at its default, or choose ga")
        if self.parts > 1 and self.options.get("mean") == "token":
            raise RemaskError(
                f"{self.method} with mean=token averages over all positions of a batch at once, which pieces would change; "
                "leave parts at 1, or set mean=row"
            )
        return self

    @property
    def definition(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def parsed(self) -> Options:
        """The method's options, typed."""
        return self.definition.parse(self.options)
