"""The experiment file: schema, defaults, and errors that name every mistake at once."""

import difflib
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from bnnmcmc.errors import InputError


class Section(BaseModel):
    """A table of the experiment file; unknown keys and values of another type are refused.

    Fields that depend on each other are checked by field validators, which see the fields before
    them: a validator of the whole section would not run, and its mistake not be reported,
    as long as any other field is wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _changed(section: type[Section], values: dict[str, Any], *names: str) -> list[str]:
    """Return those fields whose value differs from the default, so would be ignored silently."""
    fields = section.model_fields
    return [n for n in names if n in values and values[n] != fields[n].default]


class SplitConfig(Section):
    """[data.split]: which rows train, validate and test."""

    test: float = Field(
        default=0.2, ge=0, lt=1, description="share of all rows held out for scores"
    )
    validation: float = Field(
        default=0.1, ge=0, lt=1, description="share of all rows for early stopping of the ensemble"
    )
    column: str | None = Field(
        default=None,
        description="a column with the words train, validation, test, instead of shares",
    )
    train_rows: list[int] | None = Field(default=None, description="row numbers, counted from 0")
    validation_rows: list[int] | None = None
    test_rows: list[int] | None = None
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the random split")

    @field_validator("column", "train_rows", "validation_rows", "test_rows")
    @classmethod
    def _instead_of_shares(cls, value, info):
        shares = ("test", "validation") if info.field_name == "validation_rows" else ("test",)
        ignored = _changed(cls, info.data, *shares)
        if value is not None and ignored:
            raise ValueError(f"replaces the share, so remove {' and '.join(ignored)}")
        return value


class DataConfig(Section):
    """[data]: the table."""

    path: str | None = Field(
        default=None,
        description="CSV, Parquet, npz or space-separated file; also found in $BNNMCMC_DATA",
    )
    source: str | None = Field(
        default=None,
        description="sklearn:NAME or openml:NAME; used if no path is given or found",
        validate_default=True,
    )
    target: str | list[str] | None = Field(
        default=None, description="column(s) to predict; the last one if not given"
    )
    features: list[str] | None = Field(default=None, description="use only these columns")
    drop: list[str] = Field(default=[], description="columns to leave out")
    categorical: list[str] = Field(default=[], description="columns to treat as categories")
    split: SplitConfig = SplitConfig()

    @field_validator("source")
    @classmethod
    def _has_a_table(cls, value, info):
        if value is None and info.data.get("path", "of a wrong type") is None:
            raise ValueError("missing, and so is data.path; give one of them")
        return value


# The names in models/mlp.py, which imports JAX; a test holds both together.
Activation = Literal[
    "tanh",
    "relu",
    "leaky_relu",
    "silu",
    "gelu",
    "elu",
    "softplus",
    "sigmoid",
    "sin",
    "identity",
]


class ModelConfig(Section):
    """[model]: the network."""

    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        default=[16, 16, 16], description="widths of the hidden layers; [] is a linear model"
    )
    activation: Activation = "silu"
    skip: bool = Field(default=False, description="residual connections between equal widths")
    network: str | None = Field(
        default=None, description="module:function(features, outputs) -> Network, instead of an MLP"
    )

    @field_validator("network")
    @classmethod
    def _one_network(cls, value, info):
        given = _changed(cls, info.data, "hidden", "activation", "skip")
        if value is not None and given:
            raise ValueError(f"replaces the MLP, so remove {', '.join(given)}")
        return value


# Which kinds an option of [likelihood] is for.
LIKELIHOOD_OPTIONS = {
    "scale": ("gaussian", "student_t", "laplace"),
    "concentration": ("negative_binomial", "beta"),
    "df": ("student_t",),
    "components": ("gaussian_mixture",),
}
CLASSES = ("categorical", "bernoulli")
SUPPORTS: dict[str, Literal["count", "unit"]] = {
    "poisson": "count",
    "zero_inflated_poisson": "count",
    "negative_binomial": "count",
    "beta": "unit",
}


def _is_changed(section: type[Section], value: Any, info: ValidationInfo) -> bool:
    """Whether the field being validated has another value than by default."""
    return value != section.model_fields[info.field_name or ""].default


class LikelihoodConfig(Section):
    """[likelihood]: what the network's outputs mean."""

    kind: Literal[
        "gaussian",
        "student_t",
        "laplace",
        "gaussian_mixture",
        "poisson",
        "zero_inflated_poisson",
        "negative_binomial",
        "beta",
        "categorical",
        "bernoulli",
    ] = "gaussian"
    scale: Literal["predicted", "sampled"] | float = Field(
        default="predicted",
        description="of Gaussian, Student-t or Laplace noise: predicted per row, one sampled "
        "number, or a known one",
    )
    concentration: Literal["predicted", "sampled"] | float = Field(
        default="predicted", description="of negative_binomial and beta, as scale"
    )
    scale_prior: float = Field(
        default=1.0,
        gt=0,
        description="HalfNormal scale of a sampled scale, or of 1 / sqrt(concentration)",
    )
    df: Literal["sampled"] | float = Field(
        default=4.0, description="degrees of freedom of student_t, above 2"
    )
    components: int = Field(default=3, ge=2, description="of gaussian_mixture")

    @field_validator("scale", "concentration", "df", "components")
    @classmethod
    def _option_fits(cls, value, info):
        kind = info.data.get("kind")
        kinds = LIKELIHOOD_OPTIONS[info.field_name]
        if kind is not None and kind not in kinds and _is_changed(cls, value, info):
            raise ValueError(f"has no meaning for kind = {kind!r}; remove it")
        least = 2 if info.field_name == "df" else 0
        if not isinstance(value, str) and not value > least:
            raise ValueError(f"found {value}, expected more than {least}")
        return value

    @field_validator("scale_prior")
    @classmethod
    def _scale_is_sampled(cls, value, info):
        options = [info.data.get(name, "sampled") for name in ("scale", "concentration")]
        if "sampled" not in options and _is_changed(cls, value, info):
            raise ValueError('needs scale = "sampled" (or concentration); remove it')
        return value


Family = Literal["normal", "laplace", "student_t"]


class LeafPriorConfig(Section):
    """The prior of one kind of parameter."""

    family: Family = "normal"
    scale: float = Field(default=1.0, gt=0)
    fan_in: bool = Field(default=False, description="divide the scale by sqrt(fan-in)")
    df: float = Field(default=3.0, gt=0, description="degrees of freedom of student_t")

    @field_validator("df")
    @classmethod
    def _df_fits(cls, value, info):
        unused = info.data.get("family", "student_t") != "student_t"
        if unused and value != cls.model_fields["df"].default:
            raise ValueError('needs family = "student_t"; remove it')
        return value


class BiasPriorConfig(LeafPriorConfig):
    """The prior of biases."""

    @field_validator("fan_in")
    @classmethod
    def _no_fan_in(cls, value):
        if value:
            raise ValueError("a bias has no fan-in; remove it")
        return value


class LayerPriorConfig(Section):
    """[prior.layers.NAME]: the prior of one layer."""

    weight: LeafPriorConfig | None = None
    bias: BiasPriorConfig | None = None


class PriorConfig(LeafPriorConfig):
    """[prior]: of weights; biases and single layers apart if wanted."""

    bias: BiasPriorConfig | None = Field(default=None, description="as the weights' if not given")
    layers: dict[str, LayerPriorConfig] = Field(
        default={}, description="by layer name, e.g. layer0"
    )
    hierarchical: bool = Field(
        default=False, description="sample a scale for each layer; scale is that of its prior"
    )
    scales: Literal["half_normal", "half_cauchy"] = Field(
        default="half_normal", description="prior of the layers' sampled scales"
    )
    inputs: Literal["regularised_horseshoe", "horseshoe"] | None = Field(
        default=None, description="prior of the first layer's weights, with a scale for each input"
    )
    global_scale: float = Field(
        default=1.0, gt=0, description="less expects fewer relevant inputs of the horseshoe"
    )
    slab_scale: float = Field(
        default=2.0, gt=0, description="bound of an input's scale in the regularised horseshoe"
    )
    input_leaf: str = Field(
        default="layer0.weight", description="name of the leaf that holds the inputs' weights"
    )
    log_density: str | None = Field(
        default=None, description="module:function(params) -> scalar, instead of all of these"
    )

    @field_validator("scales")
    @classmethod
    def _scales_are_sampled(cls, value, info):
        unused = not info.data.get("hierarchical", True)
        if unused and value != cls.model_fields["scales"].default:
            raise ValueError("needs hierarchical = true; remove it")
        return value

    @field_validator("global_scale", "slab_scale", "input_leaf")
    @classmethod
    def _inputs_have_scales(cls, value, info):
        unused = info.data.get("inputs", "of a wrong type") is None
        if unused and value != cls.model_fields[info.field_name].default:
            raise ValueError('needs inputs = "horseshoe" or "regularised_horseshoe"; remove it')
        return value

    @field_validator("slab_scale")
    @classmethod
    def _there_is_a_slab(cls, value, info):
        unused = info.data.get("inputs") == "horseshoe"
        if unused and value != cls.model_fields["slab_scale"].default:
            raise ValueError('needs inputs = "regularised_horseshoe"; remove it')
        return value

    @field_validator("log_density")
    @classmethod
    def _one_density(cls, value, info):
        names = [name for name in cls.model_fields if name != info.field_name]
        given = _changed(cls, info.data, *names)
        if value is not None and given:
            raise ValueError(f"replaces the whole prior, so remove {', '.join(given)}")
        return value


class EnsembleConfig(Section):
    """[ensemble]: the optimiser runs that start the chains, one chain per member."""

    members: int = Field(default=10, ge=1, description="number of members, and of chains")
    optimizer: str = Field(default="adamw", description="any optimiser of optax")
    learning_rate: float = Field(default=5e-3, gt=0)
    optimizer_options: dict[str, Any] = {}
    schedule: str | None = Field(default=None, description="any schedule of optax")
    schedule_options: dict[str, Any] = {}
    batch_size: int = Field(default=32, ge=0, description="rows per step; 0 for all rows")
    max_epochs: int = Field(default=2000, ge=1)
    patience: int = Field(
        default=200,
        ge=1,
        description="epochs without a better validation loss before a member stops",
    )

    @field_validator("schedule_options")
    @classmethod
    def _schedule_fits(cls, value, info):
        if value and info.data.get("schedule", "of a wrong type") is None:
            raise ValueError("needs ensemble.schedule; remove it")
        return value


class SamplerSection(Section):
    """What all samplers share."""

    rows: Literal["train+validation", "train"] = Field(
        default="train+validation", description="the rows the posterior conditions on"
    )
    leaves: list[str] = Field(
        default=[],
        description="regular expressions for names of the leaves to sample, such as 'layer2|bias'; "
        "the others stay at the ensemble's values; [] for all",
    )


def _damping_fits(value: float, info: ValidationInfo) -> float:
    """Check that a damping that was given has a metric that it is for."""
    without = info.data.get("metric") == "identity" or info.data.get("tuning") == "mile"
    if without and value != DAMPING:
        raise ValueError('needs metric = "kronecker"; remove it')
    return value


DAMPING = 1000.0
Damping = Annotated[
    float,
    Field(gt=0, description="the curvature from which on the metric scales directions"),
    AfterValidator(_damping_fits),
]


class MCLMCConfig(SamplerSection):
    """[sampler] kernel = "mclmc": microcanonical Langevin, unadjusted, the default."""

    kernel: Literal["mclmc"] = "mclmc"
    warmup: int = Field(default=20_000, ge=0, description="warm-up steps per chain")
    draws: int = Field(default=1000, ge=1, description="kept draws per chain")
    thin: int = Field(default=10, ge=1, description="steps per kept draw")
    integrator: Literal["leapfrog", "minimal_norm"] = "leapfrog"
    energy_variance_start: float = Field(default=0.5, gt=0)
    energy_variance_end: float = Field(default=0.02, gt=0)
    initial_step_size: float = Field(default=0.005, gt=0)
    tuning: Literal["averaged", "mile"] = Field(
        default="averaged", description='"mile": as published, for comparison'
    )
    metric: Literal["auto", "kronecker", "identity"] = Field(
        default="auto",
        description='"kronecker": a product of two matrices per layer, from gradients; "auto": '
        'that, but none with tuning = "mile"',
    )
    damping: Damping = DAMPING
    settle: bool = Field(
        default=False,
        description="end a chain's warm-up early, once its log-density and step size have settled; "
        "saves time where chains run one after the other, not side by side",
    )

    @field_validator("settle")
    @classmethod
    def _is_not_published(cls, value, info):
        if value and info.data.get("tuning") == "mile":
            raise ValueError('does not go with tuning = "mile", which runs its length; remove it')
        return value

    @field_validator("metric")
    @classmethod
    def _fits_tuning(cls, value, info):
        if value == "kronecker" and info.data.get("tuning") == "mile":
            raise ValueError('does not go with tuning = "mile", which has none; remove it')
        return value


class MAMSConfig(SamplerSection):
    """[sampler] kernel = "mams": microcanonical, Metropolis-adjusted."""

    kernel: Literal["mams"]
    warmup: int = Field(default=5000, ge=0, description="warm-up steps per chain")
    draws: int = Field(default=500, ge=1, description="kept draws per chain")
    thin: int = Field(default=1, ge=1, description="steps per kept draw")
    integrator: Literal["leapfrog", "minimal_norm"] = "leapfrog"
    jitter: float = Field(default=0.5, ge=0, lt=1)
    max_steps: int = Field(default=128, ge=1, description="most steps of a trajectory, on average")
    target_acceptance: float = Field(default=0.9, gt=0, lt=1)
    energy_variance_start: float = Field(default=5.0, gt=0)
    energy_variance_end: float = Field(default=0.05, gt=0)
    initial_step_size: float = Field(default=0.005, gt=0)
    metric: Literal["kronecker", "identity"] = Field(
        default="kronecker",
        description='"kronecker": a product of two matrices per layer, from gradients',
    )
    damping: Damping = DAMPING


class HamiltonianSection(SamplerSection):
    """What NUTS and HMC share."""

    target_acceptance: float = Field(default=0.8, gt=0, lt=1)
    initial_step_size: float = Field(default=0.01, gt=0)
    metric: Literal["diagonal", "low_rank", "dense"] = Field(
        default="diagonal",
        description="inverse mass matrix: variances; these and the directions that differ most; "
        "covariances",
    )
    max_rank: int = Field(default=20, ge=1, description="most directions of a low_rank metric")
    cutoff: float = Field(
        default=2.0,
        ge=1,
        description="a low_rank metric leaves out directions within this factor of the diagonal",
    )

    @field_validator("max_rank", "cutoff")
    @classmethod
    def _fits_metric(cls, value, info):
        unused = info.data.get("metric", "low_rank") != "low_rank"
        if unused and value != cls.model_fields[info.field_name].default:
            raise ValueError('needs metric = "low_rank"; remove it')
        return value


class NUTSConfig(HamiltonianSection):
    """[sampler] kernel = "nuts": the No-U-Turn sampler."""

    kernel: Literal["nuts"]
    warmup: int = Field(default=500, ge=0, description="warm-up steps per chain")
    draws: int = Field(default=500, ge=1, description="kept draws per chain")
    thin: int = Field(default=1, ge=1, description="steps per kept draw")
    max_depth: int = Field(default=10, ge=1, le=20)
    adaptation: Literal["window", "network"] = Field(
        default="window",
        description="warm-up as in Stan; or, from an optimiser's weights, by a walk of cheap steps",
    )


class HMCConfig(HamiltonianSection):
    """[sampler] kernel = "hmc": Hamiltonian Monte Carlo."""

    kernel: Literal["hmc"]
    warmup: int = Field(default=1000, ge=0, description="warm-up steps per chain")
    draws: int = Field(default=1000, ge=1, description="kept draws per chain")
    thin: int = Field(default=1, ge=1, description="steps per kept draw")
    num_leapfrog: int = Field(default=30, ge=1)
    jitter: float = Field(default=0.5, ge=0, lt=1)


class OwnKernelConfig(SamplerSection):
    """[sampler] kernel = "module:function": a kernel of the user's own."""

    kernel: str = Field(description="module:function(**options) -> Kernel")
    warmup: int = Field(default=1000, ge=0, description="warm-up steps per chain")
    draws: int = Field(default=1000, ge=1, description="kept draws per chain")
    thin: int = Field(default=1, ge=1, description="steps per kept draw")
    options: dict[str, Any] = Field(default={}, description="arguments of the function")


class MinibatchSection(SamplerSection):
    """What the minibatch samplers share."""

    batch_size: int = Field(default=256, ge=1, description="rows per step")
    anchor: int = Field(
        default=0,
        ge=0,
        description="control variates: steps between two gradients over all rows; 0 for none",
    )
    precondition: bool = Field(
        default=True, description="scale each coordinate by the noise of its gradient"
    )
    damping: float = Field(
        default=1.0, gt=0, description="of these scales: about the prior's precision"
    )

    @field_validator("damping")
    @classmethod
    def _damping_is_used(cls, value, info):
        if not info.data.get("precondition", True) and value != cls.model_fields["damping"].default:
            raise ValueError("needs precondition = true; remove it")
        return value


class ScheduledSection(MinibatchSection):
    """What the minibatch samplers with a schedule of the step size share."""

    step_size: float = Field(default=1e-3, gt=0, description="at the end of the schedule")
    initial_step_size: float = Field(
        default=1e-2, gt=0, description="at the first warm-up step, at least step_size"
    )
    schedule: Literal["constant", "cosine", "polynomial", "cyclic"] = Field(
        default="cosine",
        description="cosine: over the warm-up, then constant; polynomial: goes on falling; cyclic: "
        "over and over again",
    )
    cycle: int = Field(default=0, ge=0, description="steps of a cycle of the cyclic schedule")

    @field_validator("initial_step_size")
    @classmethod
    def _steps_fall(cls, value, info):
        last = info.data.get("step_size", 0.0)
        if value < last:
            raise ValueError(f"found {value}, expected at least sampler.step_size, {last}")
        return value

    @field_validator("schedule")
    @classmethod
    def _first_size_is_used(cls, value, info):
        if value == "constant" and _changed(cls, info.data, "initial_step_size"):
            raise ValueError("'constant' has no other step size at first; remove initial_step_size")
        return value

    @field_validator("cycle")
    @classmethod
    def _cycle_fits(cls, value, info):
        cyclic = info.data.get("schedule", "of a wrong type")
        if cyclic == "cyclic" and value < 2:
            raise ValueError(f"found {value}, expected at least 2 with schedule = 'cyclic'")
        if value and cyclic in ("constant", "cosine", "polynomial"):
            raise ValueError("needs schedule = 'cyclic'; remove it")
        return value


class SGLDConfig(ScheduledSection):
    """[sampler] kernel = "sgld": stochastic gradient Langevin dynamics, on batches of rows."""

    kernel: Literal["sgld"]
    warmup: int = Field(default=30_000, ge=0, description="warm-up steps per chain")
    draws: int = Field(default=500, ge=1, description="kept draws per chain")
    thin: int = Field(default=100, ge=1, description="steps per kept draw")


class SGHMCConfig(ScheduledSection):
    """[sampler] kernel = "sghmc": stochastic gradient Hamiltonian Monte Carlo, on batches."""

    kernel: Literal["sghmc"]
    warmup: int = Field(default=30_000, ge=0, description="warm-up steps per chain")
    draws: int = Field(default=500, ge=1, description="kept draws per chain")
    thin: int = Field(default=100, ge=1, description="steps per kept draw")
    step_size: float = Field(default=1e-2, gt=0, description="at the end of the schedule")
    initial_step_size: float = Field(
        default=3e-2, gt=0, description="at the first warm-up step, at least step_size"
    )
    friction: float = Field(
        default=10.0, gt=0, description="a momentum lasts for about 1 / (friction step_size) steps"
    )

    @field_validator("friction")
    @classmethod
    def _friction_fits(cls, value, info):
        first = info.data.get("initial_step_size", 0.0)
        if value * first > 1:
            raise ValueError(
                f"found {value}, expected at most 1 / sampler.initial_step_size, {1 / first:g}"
            )
        return value


class SMILEConfig(MinibatchSection):
    """[sampler] kernel = "smile": microcanonical Langevin, on batches, noise-preconditioned."""

    kernel: Literal["smile"]
    warmup: int = Field(default=8000, ge=0, description="warm-up steps per chain")
    draws: int = Field(default=300, ge=1, description="kept draws per chain")
    thin: int = Field(default=60, ge=1, description="steps per kept draw")
    anchor: int = Field(
        default=100,
        ge=0,
        description="control variates: steps between two gradients over all rows; 0 for none",
    )
    energy_variance_start: float = Field(default=5.0, gt=0)
    energy_variance_end: float = Field(default=0.5, gt=0)
    initial_step_size: float = Field(default=0.005, gt=0)


SAMPLERS = {
    "mclmc": MCLMCConfig,
    "mams": MAMSConfig,
    "nuts": NUTSConfig,
    "hmc": HMCConfig,
    "sgld": SGLDConfig,
    "sghmc": SGHMCConfig,
    "smile": SMILEConfig,
}
# The user's kernels have a colon in their names, ours have not.
OWN = "module:function"


def _kernel_kind(section: Any) -> Any:
    """Return which of `SAMPLERS`, or `OWN`, a [sampler] section is; None if it is no section."""
    if not isinstance(section, dict | SamplerSection):
        return None
    kernel = section["kernel"] if isinstance(section, dict) else getattr(section, "kernel", None)
    return OWN if ":" in str(kernel) else str(kernel)


class StopConfig(Section):
    """[stop]: sample until a target is met, but no more than sampler.draws."""

    ess: float = Field(
        default=0.0,
        ge=0,
        description="function-space ESS to reach, all chains together: bulk ESS of a prediction "
        "within each chain, summed over chains, median over predictions of validation inputs; 0: "
        "no such target",
    )
    lppd: float = Field(
        default=0.0,
        ge=0,
        description="the LPPD on the validation rows has settled when its last checks + 1 values "
        'differ by no more than this, in nats per row; needs sampler.rows = "train"; 0: no such '
        "target",
    )
    every: int = Field(
        default=50,
        ge=10,
        description="draws to the next check; after ten checks, each comes a tenth later",
    )
    checks: int = Field(
        default=3, ge=2, description="for how many checks the LPPD has to stay where it is"
    )

    @field_validator("every")
    @classmethod
    def _every_fits(cls, value, info):
        targets = _changed(cls, info.data, "ess", "lppd")
        wrong_elsewhere = not {"ess", "lppd"} <= set(info.data)
        if value != cls.model_fields["every"].default and not (targets or wrong_elsewhere):
            raise ValueError("needs a target, stop.ess or stop.lppd; add one, or remove it")
        return value

    @field_validator("checks")
    @classmethod
    def _checks_fits(cls, value, info):
        unused = info.data.get("lppd", "of a wrong type") == 0
        if value != cls.model_fields["checks"].default and unused:
            raise ValueError("needs stop.lppd; add that, or remove it")
        return value


class PoolConfig(Section):
    """[pool]: how draws are pooled."""

    weights: Literal["equal", "stacking", "pseudo_bma"] = Field(
        default="equal",
        description="of the chains: all the same, or by their log score on the validation rows, "
        'which needs sampler.rows = "train"',
    )
    draws: int = Field(
        default=0,
        ge=0,
        description="predict with about so many draws of all chains together, evenly spaced; 0 "
        "for all",
    )


class CalibrationConfig(Section):
    """[calibration]: how predictions are corrected on the validation rows."""

    method: Literal["none", "split", "cqr", "temperature"] = Field(
        default="none",
        description="split-conformal or conformalised quantile (cqr) intervals, or a temperature "
        'for classes; needs sampler.rows = "train"',
    )


class RunConfig(Section):
    """[run]: everything about the run that is not the model."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Literal["float32", "float64"] = "float32"
    devices: int = Field(default=0, ge=0, description="how many devices to use; 0 for all")
    mode: Literal["auto", "map", "vmap"] = Field(
        default="auto", description="chains one after the other (CPU) or side by side (GPU)"
    )
    group: int = Field(
        default=0, ge=0, description="in mode map: chains that advance together; 0 to choose"
    )
    row_chunk: int = Field(
        default=0,
        ge=0,
        description="rows that go through the network at a time; 0 to choose",
    )
    block_draws: int = Field(
        default=0, ge=0, description="most draws between two saves; 0 for about a second's worth"
    )
    arviz: Literal["auto", "netcdf", "zarr", "none"] = Field(
        default="auto",
        description="write an ArviZ file; auto: netcdf, thinned to stay below 64 MB; netcdf and "
        "zarr: every draw, all in memory",
    )

    @field_validator("group")
    @classmethod
    def _group_fits(cls, value, info):
        if value and info.data.get("mode") != "map":
            raise ValueError('has a meaning only with mode = "map"; add that, or remove it')
        return value


class Config(Section):
    """An experiment."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    likelihood: LikelihoodConfig = LikelihoodConfig()
    prior: PriorConfig = PriorConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    sampler: Annotated[
        Annotated[MCLMCConfig, Tag("mclmc")]
        | Annotated[MAMSConfig, Tag("mams")]
        | Annotated[NUTSConfig, Tag("nuts")]
        | Annotated[HMCConfig, Tag("hmc")]
        | Annotated[SGLDConfig, Tag("sgld")]
        | Annotated[SGHMCConfig, Tag("sghmc")]
        | Annotated[SMILEConfig, Tag("smile")]
        | Annotated[OwnKernelConfig, Tag(OWN)],
        Discriminator(_kernel_kind),
    ] = MCLMCConfig()
    stop: StopConfig = StopConfig()
    pool: PoolConfig = PoolConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    run: RunConfig = RunConfig()

    @field_validator("stop")
    @classmethod
    def _held_out(cls, value, info):
        sampler = info.data.get("sampler")
        if value.lppd and sampler is not None and sampler.rows != "train":
            raise ValueError(
                'lppd needs sampler.rows = "train", found "train+validation": the LPPD of rows '
                "that the posterior conditions on is no held-out score; set that, or stop by ess"
            )
        return value

    @field_validator("pool")
    @classmethod
    def _weights_held_out(cls, value, info):
        sampler = info.data.get("sampler")
        if value.weights != "equal" and sampler is not None and sampler.rows != "train":
            raise ValueError(
                f'weights = "{value.weights}" needs sampler.rows = "train", found '
                '"train+validation": weights are fitted on the validation rows, which the chains '
                "must not have seen; set that, or take equal weights"
            )
        return value

    @field_validator("calibration")
    @classmethod
    def _calibrated_on_new_rows(cls, value, info):
        if value.method == "none":
            return value
        sampler, pool, likelihood = (info.data.get(n) for n in ("sampler", "pool", "likelihood"))
        if sampler is not None and sampler.rows != "train":
            raise ValueError(
                f'method = "{value.method}" needs sampler.rows = "train", found '
                '"train+validation": it is fitted on the validation rows, which the chains must '
                'not have seen; set that, or method = "none"'
            )
        if pool is not None and pool.weights != "equal":
            raise ValueError(
                f'method = "{value.method}" needs pool.weights = "equal", found "{pool.weights}": '
                "the validation rows cannot serve both"
            )
        stop = info.data.get("stop")
        if stop is not None and stop.lppd:
            raise ValueError(
                f'method = "{value.method}" is fitted on the validation rows, but stop.lppd ends '
                "sampling by them; stop by ess, or by the number of draws"
            )
        numbers = likelihood is None or likelihood.kind not in CLASSES
        if likelihood is not None and numbers == (value.method == "temperature"):
            expected = "split or cqr" if numbers else "temperature"
            raise ValueError(
                f'method: found "{value.method}", expected {expected} for likelihood.kind = '
                f'"{likelihood.kind}"'
            )
        return value

    @property
    def task(self) -> Literal["regression", "classification"]:
        """Whether the target is numbers or classes."""
        return "classification" if self.likelihood.kind in CLASSES else "regression"

    @property
    def support(self) -> Literal["real", "count", "unit"]:
        """What a numeric target can be: any number, a count, or a share between 0 and 1."""
        return SUPPORTS.get(self.likelihood.kind, "real")


def parse(tables: dict[str, Any], name: str) -> Config:
    """Check the tables of an experiment file.

    Parameters
    ----------
    tables : dict
        Nested, as `tomllib` reads them.
    name : str
        The file's name, for messages.

    Returns
    -------
    Config

    Raises
    ------
    InputError
        Lists every mistake: field, what was found, what was expected.
    """
    tables = {key: dict(v) if isinstance(v, dict) else v for key, v in tables.items()}
    sampler = tables.get("sampler")
    if isinstance(sampler, dict):
        sampler.setdefault("kernel", "mclmc")
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        lines = _one_line_per_field([_sentence(e, tables) for e in error.errors()])
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    raise InputError(f"{name}: {count}\n" + "\n".join(f"  {line}" for line in lines))


def _one_line_per_field(sentences: list[str]) -> list[str]:
    """Join the errors that a union of types reports, one per alternative, into one line."""
    lines: list[str] = []
    for sentence in sentences:
        start = sentence.split("it should be ")[0]
        if lines and "it should be " in sentence and lines[-1].startswith(start):
            lines[-1] += " or " + sentence[len(start) + len("it should be ") :]
        else:
            lines.append(sentence)
    return lines


def _sentence(error: Any, tables: dict) -> str:
    kernels = (*SAMPLERS, OWN)
    path = [str(p) for p in error["loc"]]
    if len(path) > 1 and path[0] == "sampler" and path[1] in kernels:
        path.pop(1)
    if error["type"] != "extra_forbidden":
        # Pydantic adds the alternative of a union to the path; a user's file has no such key.
        path = [p for p in path if p not in ("float", "str", "list[str]") and "literal[" not in p]
    field, found = ".".join(path), error.get("input")
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1], tables)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        return f"{field}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{field}: missing, and needed"
    if error["type"] == "value_error":
        return f"{field}: {error['ctx']['error']!s}"
    if error["type"] == "union_tag_invalid":
        return (
            f"sampler.kernel: found {found.get('kernel')!r}, expected one of {', '.join(kernels)}"
        )
    if error["type"] in ("model_type", "dict_type", "union_tag_not_found"):
        return f"{field}: found {found!r}, but it should be a table, [{field}]"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{field}: found {found!r}, but {message.replace('input should', 'it should')}"


def _known_keys(path: Sequence[str], tables: dict) -> list[str]:
    """Return the keys that the section at this path knows."""
    model: Any = Config
    for part in path:
        if part == "sampler":
            model = SAMPLERS.get(tables["sampler"].get("kernel", "mclmc"), OwnKernelConfig)
            continue
        if part not in model.model_fields:
            continue  # a name of the user's own, such as a layer
        model = _section_of(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section_of(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType, dict, Annotated):
        sections = [s for s in map(_section_of, get_args(annotation)) if s is not None]
        return sections[0] if sections else None
    return annotation if hasattr(annotation, "model_fields") else None


def set_keys(tables: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return the tables with ``section.key=value`` settings applied.

    Parameters
    ----------
    tables : dict
    settings : sequence of str
        Values are written as in TOML; a value that is not TOML is taken as a string.

    Raises
    ------
    InputError
        A setting without key or "=", or one that goes through a value as if it were a section.
    """
    result = _copy(tables)
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise InputError(f"--set {setting}: expected section.key=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        table = result
        for part in parts[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise InputError(f"--set {setting}: {part!r} is a value, not a section")
        table[parts[-1]] = value
    return result


def _copy(tables: dict) -> dict:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in tables.items()}


def read_tables(path: str | Path) -> dict[str, Any]:
    """Read an experiment file.

    Raises
    ------
    InputError
        No such file (the nearest names are given), or not TOML.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        names = [p.name for p in folder.glob("*.toml")]
        near = difflib.get_close_matches(path.name, names, n=2)
        hint = f"; did you mean {' or '.join(str(folder / n) for n in near)}?" if near else ""
        raise InputError(f"{path}: no such experiment file{hint}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error


def read_config(path: str | Path, settings: Sequence[str] = ()) -> Config:
    """Read an experiment file and apply ``--set`` settings.

    Parameters
    ----------
    path : path
    settings : sequence of str
        See `set_keys`.

    Returns
    -------
    Config

    Raises
    ------
    InputError
        All mistakes at once.
    """
    return parse(set_keys(read_tables(path), settings), str(path))


# Fields of [run] that say where chains run -> the value that leaves the choice to the program.
LEFT_OPEN = {"mode": "auto", "group": 0, "row_chunk": 0}


def with_placement(config: Config, chosen: Mapping[str, Any]) -> Config:
    """Return a config in which what it leaves open about the placement is as it was chosen.

    Parameters
    ----------
    config : Config
    chosen : mapping
        "mode", "group" and "row_chunk" of [run].
    """
    fields = {n: chosen[n] for n, value in LEFT_OPEN.items() if getattr(config.run, n) == value}
    return config.model_copy(update={"run": config.run.model_copy(update=fields)})


def to_toml(config: Config) -> str:
    """Write a config as TOML, every default spelt out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))
