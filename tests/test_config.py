import tomllib

import pytest

from bnnmcmc.config import Config, parse, read_config, read_tables, set_keys, to_toml
from bnnmcmc.errors import InputError

DATA = {"path": "table.csv"}


def mistakes(tables):
    """Return the lines of the error, without their indentation."""
    with pytest.raises(InputError) as caught:
        parse(tables, "experiment.toml")
    return [line.strip() for line in str(caught.value).splitlines()]


def mistake(**sections):
    lines = mistakes({"data": DATA, **sections})
    assert lines[0] == "experiment.toml: 1 mistake"
    assert len(lines) == 2, lines
    return lines[1]


def test_defaults():
    config = parse({"data": DATA}, "e.toml")
    assert config.sampler.kernel == "mclmc"
    assert (config.ensemble.members, config.run.seed, config.prior.scale) == (10, 0, 1.0)
    assert config.sampler.rows == "train+validation"
    assert config.likelihood.kind == "gaussian"
    assert config.task == "regression"
    assert parse({"data": DATA, "likelihood": {"kind": "bernoulli"}}, "").task == "classification"


def test_every_mistake_is_reported_at_once():
    lines = mistakes(
        {
            "data": {"sorce": "sklearn:diabetes", "split": {"test": 1.5, "sed": 1}},
            "model": {"hidden": [16, "16"], "skip": "yes"},
            "likelihood": {"scale": "predictd", "kind": "gauss"},
            "prior": {"df": 4.0, "layers": {"layer0": {"weigth": {}, "bias": {"scale": -1.0}}}},
            "ensemble": {"members": "ten", "learning_rate": float("nan")},
            "sampler": {"kernel": "nuts", "max_dept": 3},
            "run": {"seed": -1},
            "sampelr": {},
        }
    )
    assert lines[0] == "experiment.toml: 16 mistakes"
    assert sorted(lines[1:]) == sorted(
        [
            "data.source: missing, and so is data.path; give one of them",
            "data.sorce: unknown key; did you mean 'source'?",
            "data.split.test: found 1.5, but it should be less than 1",
            "data.split.sed: unknown key; did you mean 'seed'?",
            "model.hidden.1: found '16', but it should be a valid integer",
            "model.skip: found 'yes', but it should be a valid boolean",
            "likelihood.kind: found 'gauss', but it should be 'gaussian', 'student_t', 'laplace', "
            "'gaussian_mixture', 'poisson', 'zero_inflated_poisson', 'negative_binomial', 'beta', "
            "'categorical' or 'bernoulli'",
            "likelihood.scale: found 'predictd', but it should be 'predicted' or 'sampled' or a "
            "valid number",
            'prior.df: needs family = "student_t"; remove it',
            "prior.layers.layer0.weigth: unknown key; did you mean 'weight'?",
            "prior.layers.layer0.bias.scale: found -1.0, but it should be greater than 0",
            "ensemble.members: found 'ten', but it should be a valid integer",
            "ensemble.learning_rate: found nan, but it should be a finite number",
            "sampler.max_dept: unknown key; did you mean 'max_depth'?",
            "run.seed: found -1, but it should be greater than or equal to 0",
            "sampelr: unknown key; did you mean 'sampler'?",
        ]
    )


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"mdel": {}}, "mdel: unknown key; did you mean 'model'?"),
        (
            {"zzz": 1},
            "zzz: unknown key; known: data, model, likelihood, prior, ensemble, sampler, stop, "
            "pool, calibration, run",
        ),
        ({"float": 1}, "float: unknown key; known: data, model, likelihood, prior, ensemble, "),
        ({"model": {"str": 1}}, "model.str: unknown key; known: hidden, activation, skip, network"),
        ({"sampler": {"drws": 1}}, "sampler.drws: unknown key; did you mean 'draws'?"),
        # What another kernel knows, this one does not.
        ({"sampler": {"max_depth": 3}}, "sampler.max_depth: unknown key; "),
        ({"prior": {"bias": {"scal": 1.0}}}, "prior.bias.scal: unknown key; did you mean 'scale'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known(sections, line):
    assert mistake(**sections).startswith(line)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"model": 5}, "model: found 5, but it should be a table, [model]"),
        ({"sampler": "nuts"}, "sampler: found 'nuts', but it should be a table, [sampler]"),
        ({"prior": {"layers": 5}}, "prior.layers: found 5, but it should be a table"),
        (
            {"prior": {"layers": {"layer0": 1.0}}},
            "prior.layers.layer0: found 1.0, but it should be a table, [prior.layers.layer0]",
        ),
        (
            {"data": {"path": "t.csv", "target": 5}},
            "data.target: found 5, but it should be a valid string or a valid list",
        ),
        ({"data": {"path": 7}}, "data.path: found 7, but it should be a valid string"),
        ({"ensemble": {"members": "10"}}, "ensemble.members: found '10', but it should be a valid"),
        ({"ensemble": {"members": True}}, "ensemble.members: found True, but it should be a valid"),
        ({"ensemble": {"patience": 1.5}}, "ensemble.patience: found 1.5, but it should be a valid"),
        ({"ensemble": {"learning_rate": "a"}}, "ensemble.learning_rate: found 'a', but it should"),
        ({"run": {"devices": -1}}, "run.devices: found -1, but it should be greater than or equal"),
        ({"run": {"seed": 2**32}}, "run.seed: found 4294967296, but it should be less than 429496"),
        ({"likelihood": {"scale": 0.0}}, "likelihood.scale: found 0.0, expected more than 0"),
        ({"likelihood": {"scale": float("inf")}}, "likelihood.scale: found inf, but it should be"),
        ({"sampler": {"kernel": "nutz"}}, "sampler.kernel: found 'nutz', expected one of mclmc, "),
        (
            {"sampler": {"kernel": 5}},
            "sampler.kernel: found 5, expected one of mclmc, ma",
        ),
        ({"data": {}}, "data.source: missing, and so is data.path; give one of them"),
    ],
)
def test_a_wrong_type_or_value_is_refused(sections, line):
    assert mistake(**sections).startswith(line)


def test_no_data_section_at_all():
    assert mistakes({})[1] == "data: missing, and needed"


def test_whole_numbers_count_as_numbers():
    config = parse({"data": DATA, "likelihood": {"scale": 2}, "prior": {"scale": 3}}, "")
    assert (config.likelihood.scale, config.prior.scale) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"likelihood": {"scale_prior": 2.0}}, 'likelihood.scale_prior: needs scale = "sampled"'),
        (
            {"likelihood": {"kind": "categorical", "scale": 0.5}},
            "likelihood.scale: has no meaning for kind = 'categorical'; remove it",
        ),
        (
            {"model": {"network": "my:net", "hidden": [4], "skip": True}},
            "model.network: replaces the MLP, so remove hidden, skip",
        ),
        ({"prior": {"df": 5.0}}, 'prior.df: needs family = "student_t"; remove it'),
        ({"prior": {"bias": {"fan_in": True}}}, "prior.bias.fan_in: a bias has no fan-in; remove"),
        (
            {"prior": {"layers": {"layer0": {"bias": {"fan_in": True}}}}},
            "prior.layers.layer0.bias.fan_in: a bias has no fan-in; remove it",
        ),
        (
            {"ensemble": {"schedule_options": {"decay_steps": 10}}},
            "ensemble.schedule_options: needs ensemble.schedule; remove it",
        ),
        ({"run": {"mode": "vmap", "group": 4}}, 'run.group: has a meaning only with mode = "map"'),
        (
            {"data": {**DATA, "split": {"column": "part", "test": 0.3}}},
            "data.split.column: replaces the share, so remove test",
        ),
        (
            {"data": {**DATA, "split": {"validation_rows": [1], "test": 0.3, "validation": 0.3}}},
            "data.split.validation_rows: replaces the share, so remove test and validation",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(sections, line):
    assert mistake(**sections).startswith(line)


def test_the_same_options_are_taken_where_they_do_something():
    config = parse(
        {
            "data": {**DATA, "split": {"column": "part", "validation": 0.3}},
            "likelihood": {"scale": "sampled", "scale_prior": 2.0},
            "prior": {"family": "student_t", "df": 5.0, "fan_in": True, "bias": {"scale": 2.0}},
            "ensemble": {
                "schedule": "cosine_decay_schedule",
                "schedule_options": {"decay_steps": 9},
            },
            "run": {"mode": "map", "group": 4},
        },
        "",
    )
    assert (config.likelihood.scale_prior, config.prior.df, config.run.group) == (2.0, 5.0, 4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1.5e-3", -0.0015),
        ("true", True),
        ("false", False),
        ('"3"', "3"),
        ("'a b'", "a b"),
        ("silu", "silu"),
        ("other.data", "other.data"),
        ("data/x=1.csv", "data/x=1.csv"),
        ("a, b,c", "a, b,c"),
        ("[16, 16]", [16, 16]),
        ("[]", []),
        ('["a", "b,c"]', ["a", "b,c"]),
        ("{ scale = 2.0, family = 'laplace' }", {"scale": 2.0, "family": "laplace"}),
        ("sklearn:diabetes", "sklearn:diabetes"),
        ("", ""),
        ("  x ", "x"),
    ],
)
def test_set_takes_every_kind_of_value(text, value):
    found = set_keys({"a": {"b": 0, "c": 1}}, [f"a.b={text}"])
    assert found == {"a": {"b": value, "c": 1}}
    assert type(found["a"]["b"]) is type(value)


def test_set_makes_new_sections_and_leaves_the_tables_alone():
    tables = {"data": {"path": "x"}}
    settings = [
        "prior.layers.layer0.weight.scale=2.0",
        " data.path = y ",
        "run.seed=1",
        "run.seed=2",
    ]
    assert set_keys(tables, settings) == {
        "data": {"path": "y"},
        "prior": {"layers": {"layer0": {"weight": {"scale": 2.0}}}},
        "run": {"seed": 2},
    }
    assert tables == {"data": {"path": "x"}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.seed", "--set run.seed: expected section.key=value"),
        ("=3", "--set =3: expected section.key=value"),
        ("run.=3", "--set run.=3: expected section.key=value"),
        ("data.path.x=3", "--set data.path.x=3: 'path' is a value, not a section"),
    ],
)
def test_set_refuses(setting, message):
    with pytest.raises(InputError) as caught:
        set_keys({"data": {"path": "x"}}, [setting])
    assert str(caught.value) == message


def test_set_reaches_the_checks(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text('[data]\npath = "t.csv"\n[sampler]\nkernel = "nuts"\nmax_depth = 7\n')
    config = read_config(path, ["model.hidden=[]", "data.target=a,b", "model.skip=true"])
    assert (config.model.hidden, config.data.target, config.model.skip) == ([], "a,b", True)
    assert (config.sampler.kernel, config.sampler.max_depth) == ("nuts", 7)
    with pytest.raises(InputError, match=r"e\.toml: 2 mistakes\n") as caught:
        read_config(path, ["model.hidden=16,16", "data.pth=x"])
    assert "model.hidden: found '16,16', but it should be a valid list" in str(caught.value)
    assert "data.pth: unknown key; did you mean 'path'?" in str(caught.value)


FULL = [
    {"sampler": {"kernel": "mclmc", "thin": 3, "integrator": "minimal_norm"}},
    {"sampler": {"kernel": "nuts", "max_depth": 7}, "likelihood": {"kind": "bernoulli"}},
    {"sampler": {"kernel": "hmc", "jitter": 0.0}, "likelihood": {"scale": 0.1}},
    {"sampler": {"kernel": "sgld", "schedule": "cyclic", "cycle": 50, "anchor": 100}},
    {"sampler": {"kernel": "sghmc", "step_size": 0.02, "friction": 5.0}},
    {"sampler": {"kernel": "smile", "batch_size": 64, "damping": 0.5}},
    {
        "data": {
            "source": "sklearn:diabetes",
            "target": ["a", 'b "c"', "d\ne"],
            "split": {"train_rows": [0, 1], "test_rows": []},
        },
        "model": {"hidden": []},
        "likelihood": {"scale": "sampled", "scale_prior": 2.5},
        "prior": {
            "family": "student_t",
            "df": 4.0,
            "fan_in": True,
            "bias": {"family": "laplace", "scale": 0.1},
            "layers": {
                "layer0": {"weight": {"scale": 2.0, "fan_in": True}},
                "layer1": {"bias": {"family": "student_t", "df": 7.5}},
            },
        },
        "ensemble": {
            "schedule": "cosine_decay_schedule",
            "schedule_options": {"decay_steps": 100, "alpha": 1e-7},
            "optimizer_options": {"weight_decay": 0.1, "nesterov": True},
        },
        "run": {"seed": 2**32 - 1, "precision": "float64"},
    },
]


@pytest.mark.parametrize("sections", FULL)
def test_a_config_survives_its_file(sections, tmp_path):
    config = parse({"data": DATA, **sections}, "")
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert read_config(path) == config
    assert parse(tomllib.loads(to_toml(config)), "") == config


def test_to_toml_spells_out_every_default():
    tables = tomllib.loads(to_toml(parse({"data": DATA}, "")))
    assert set(tables) == set(Config.model_fields)
    assert tables["sampler"]["kernel"] == "mclmc"
    assert tables["run"]["precision"] == "float32"


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "airfoil.toml").write_text("[data\n")
    with pytest.raises(
        InputError, match=r"airfoil\.tml: no such experiment file; did you mean .*airfoil\.toml"
    ):
        read_tables(tmp_path / "airfoil.tml")
    with pytest.raises(InputError, match=r"airfoil\.toml: not a TOML file: .*line 1"):
        read_tables(tmp_path / "airfoil.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.toml: not a TOML file"):
        read_tables(tmp_path / "binary.toml")


def test_every_activation_of_the_mlp_can_be_named():
    from typing import get_args

    from bnnmcmc.config import Activation
    from bnnmcmc.models.mlp import ACTIVATIONS

    assert set(get_args(Activation)) == set(ACTIVATIONS)
