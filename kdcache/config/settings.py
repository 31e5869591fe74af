"""What a training run is made of: every setting, its default, its range and its meaning.

Pydantic models only; reading, merging and writing files is `config.files`. Never imports torch.
Invariant: unknown keys are refused, so a misspelt setting cannot be ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kdcache.config.schedules import (
    Fraction,
    LinearWarmupExponentialDecay,
    NotNegative,
    Positive,
    RateSchedule,
    Section,
    WeightSchedule,
)


class ModelConfig(BaseModel):
    """The student: a model's name and its own hyperparameters, which that model checks."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(
        default="painn-small",
        description="painn, schnet, or a preset: painn-small, painn-small-oc20, …",
    )

    @model_validator(mode="before")
    @classmethod
    def _text_is_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @property
    def hyperparameters(self) -> dict[str, object]:
        """All but the name."""
        return dict(self.model_extra or {})


class ReferencesConfig(Section):
    """Atomic reference energies, subtracted before training and added at prediction."""

    mode: Literal["least_squares", "isolated", "given", "none"] = "least_squares"
    values: dict[str, float] = Field(
        default={}, description="eV by element, for mode given: {H: -13.6}"
    )
    file: str | None = Field(
        default=None,
        description="mode given: YAML or JSON with such values; mode isolated: structures of "
        "single atoms, in any format that is read; null: those in the store",
    )

    @model_validator(mode="after")
    def _given_has_values(self) -> Self:
        given = bool(self.values) or (self.file is not None and self.mode != "isolated")
        if given != (self.mode == "given"):
            raise ValueError(
                f"mode {self.mode} with{'' if given else 'out'} values or file; values belong to "
                f"mode given, a file to mode given or isolated"
            )
        return self


class OverlayConfig(Section):
    """A store of structures that a teacher labelled, mixed into the training."""

    store: str = Field(description="path of the overlay, as `kdcache augment` made it")
    share: Fraction = Field(
        default=0.5, description="alpha_target, the share of every batch that is drawn from it"
    )
    ratio: Positive = Field(
        default=1.0, description="r = w_s / w_dft, weight in every loss over the dataset's"
    )
    labels: Literal["teacher", "own"] = Field(
        default="teacher",
        description="teacher: its energies and forces stand in for the ground truth; own: what "
        "ground truth the overlay has, mostly none",
    )
    teacher_name: str | None = Field(
        default=None, description="whose labels; null where the overlay has one teacher"
    )

    @model_validator(mode="before")
    @classmethod
    def _text_is_store(cls, value: object) -> object:
        return {"store": value} if isinstance(value, str) else value


class DataConfig(Section):
    """Which structures are trained on, and whose labels are seen."""

    labels: float = Field(default=1.0, gt=0, le=1, description="share of labelled structures seen")
    labels_seed: int = Field(
        default=0, ge=0, description="chooses them, and the validation structures"
    )
    val_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="held out where no split says so"
    )
    labelled_share: Fraction | None = Field(
        default=0.8,
        description="least share of a batch drawn from labelled structures; null: as they come",
    )
    max_force: Positive | None = Field(
        default=None, description="eV/Å; structures above are dropped"
    )
    min_edge_coverage: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="least share of the student's edges that a teacher of edge features has; an "
        "edge it lacks learns from the other terms alone",
    )
    overlays: tuple[OverlayConfig, ...] = Field(
        default=(), description="structures labelled by a teacher, mixed into every batch"
    )


class LossConfig(Section):
    """The ground-truth loss, alpha_E L_E + alpha_F L_F."""

    energy: Literal["mae", "mse", "huber", "rmse+mae"] = "mae"
    forces: Literal["l2mae", "mae", "mse", "huber", "rmse+mae"] = "l2mae"
    energy_weight: WeightSchedule = Field(
        default=WeightSchedule.model_validate(1), description="alpha_E"
    )
    forces_weight: WeightSchedule = Field(
        default=WeightSchedule.model_validate(100), description="alpha_F"
    )
    energy_per_atom: bool = Field(default=False, description="compare energies divided by n_atoms")
    free_atoms_only: bool = Field(
        default=True,
        description="leave atoms that the data holds fixed out of the force loss and force errors, "
        "as OC20 does",
    )
    mean_over: Literal["labelled", "batch"] = Field(
        default="labelled",
        description="batch: a label weighs what a teacher's value does, however few there are",
    )


class ProjectionConfig(Section):
    """A map of feature channels, M_s or M_t."""

    kind: Literal["identity", "linear", "mlp"] = "identity"
    bias: bool | None = Field(default=None, description="null: only for invariant features")
    width: int | None = Field(
        default=None, ge=1, description="channels out; null: the other side's"
    )
    hidden: int | None = Field(
        default=None, ge=1, description="of mlp; null: twice the channels in"
    )
    trained: bool | None = Field(
        default=None,
        description="null: the student's side is, the teacher's is not; never both at once",
    )

    @model_validator(mode="before")
    @classmethod
    def _text_is_kind(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value


class TermConfig(Section):
    """One distillation term, lambda(t) L(M_s(H_s), M_t(H_t))."""

    name: str = Field(pattern=r"^[A-Za-z0-9_+\-]+$", description="unique; its column in metrics")
    student: str = Field(
        description="student feature or output: node, vector, atomic_energy, …; or an inner "
        "module's, as kind/name=path: node/msg2=message_layers.2"
    )
    teacher: str = Field(description="teacher field, as in the store")
    teacher_name: str | None = Field(default=None, description="null where there is only one")
    loss: str = Field(
        default="mse",
        description="mse, mae, huber, rmse+mae, l2mae, geometric, lsp, gsp, cka, or a registered "
        "one",
    )
    weight: WeightSchedule = Field(default=WeightSchedule.model_validate(1), description="lambda")
    student_projection: ProjectionConfig = Field(
        default=ProjectionConfig(), description="trained with the student, dropped at export"
    )
    teacher_projection: ProjectionConfig = Field(
        default=ProjectionConfig(),
        description="identity, linear (frozen random orthonormal, or trained), or a trained mlp",
    )
    normalise: Literal["none", "rms"] = Field(
        default="none", description="rms divides both sides by the teacher field's root mean square"
    )
    per_atom: bool = Field(
        default=False, description="divide structure-level values by n_atoms first"
    )


class OptimizerConfig(Section):
    """How gradients become steps."""

    name: Literal["adamw", "adam"] = "adamw"
    lr: Positive = Field(default=1e-3, description="peak learning rate")
    amsgrad: bool = True
    weight_decay: NotNegative = Field(default=0.0, description="on weight matrices only")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: Positive = 1e-8


class TrainingConfig(Section):
    """Length, batches, rhythm and machine."""

    max_steps: int = Field(default=20_000, ge=1, description="optimizer steps")
    batch_size: int = Field(default=32, ge=1, description="structures, of all processes together")
    max_atoms: int | None = Field(
        default=None,
        ge=1,
        description="atoms in a batch of all processes together; batch_size does not count then",
    )
    max_edges: int | None = Field(
        default=None, ge=1, description="edges likewise; with max_atoms, whichever is reached first"
    )
    eval_every: int = Field(default=1_000, ge=1, description="steps between evaluations")
    checkpoint_every: int = Field(default=1_000, ge=1, description="steps between checkpoints")
    seed: int = Field(default=0, ge=0, description="of weights, projections and batches")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, …")
    precision: Literal["float32", "bf16", "float64"] = Field(
        default="float32", description="bf16 is autocast, weights stay float32"
    )
    compile: bool = Field(default=False, description="torch.compile the student")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch; null: its choice"
    )
    tensorboard: bool = False


class StudentConfig(Section):
    """A whole training run. Without terms it trains a teacher, or the control."""

    model: ModelConfig = ModelConfig()
    references: ReferencesConfig = ReferencesConfig()
    scale: Literal["auto"] | Positive = Field(
        default="auto", description="eV; auto: from the forces' RMS"
    )
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    terms: tuple[TermConfig, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: RateSchedule = LinearWarmupExponentialDecay()
    ema: float | None = Field(
        default=0.999, gt=0, lt=1, description="of averaged weights; null: none"
    )
    clip_norm: Positive | None = Field(
        default=10.0, description="largest gradient norm; null: no clipping"
    )
    training: TrainingConfig = TrainingConfig()

    @field_validator("schedule", mode="before")
    @classmethod
    def _name_may_be_left_out(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict):
            return {"name": LinearWarmupExponentialDecay().name, **value}
        return value

    @field_validator("terms")
    @classmethod
    def _names_differ(cls, terms: tuple[TermConfig, ...]) -> tuple[TermConfig, ...]:
        names = [term.name for term in terms]
        twice = sorted({name for name in names if names.count(name) > 1} | {"energy", "forces"})
        clash = [name for name in twice if name in names]
        if clash:
            raise ValueError(f"{clash[0]} is taken; terms need names of their own, got {names}")
        return terms
