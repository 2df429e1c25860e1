"""What a user can get wrong, each with the message that says so before any long work."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from bnnmcmc.config import read_config
from bnnmcmc.errors import InputError
from bnnmcmc.inputs import read_dataset
from bnnmcmc.pipeline import resume_run, start_run
from bnnmcmc.results import refresh_results
from bnnmcmc.run import Run

QUIET = Console(quiet=True)


def start(folder, *settings):
    """Start tiny.toml in this process, as the command line would."""
    config = read_config(folder / "tiny.toml", settings)
    dataset = read_dataset(config, folder)
    return start_run(config, dataset, folder / "run", name="t", command="-", console=QUIET)


def edit(folder, change):
    table = pd.read_csv(folder / "table.csv")
    change(table).to_csv(folder / "table.csv", index=False)


def put(column, row, value):
    def change(table):
        table[column] = table[column].astype(object)
        table.loc[row, column] = value
        return table

    return change


TABLES = {
    "empty table": (lambda t: t.iloc[:0], [], r"table\.csv: a header \(line 1\) but no rows"),
    "word among numbers": (
        put("a", 3, "high"),
        [],
        r"table\.csv, line 5, column 'a': found 'high', expected a number",
    ),
    "missing cell": (
        put("b", 0, "nan"),
        [],
        r"table\.csv, line 2, column 'b': found a missing value",
    ),
    "infinite cell": (
        put("y", 9, "inf"),
        [],
        r"table\.csv, line 11, column 'y': found the infinite value inf",
    ),
    "constant column": (
        lambda t: t.assign(a=1.0),
        [],
        r"column 'a': .*constant|constant.*'a'|'a'.*same value",
    ),
    "constant target": (
        lambda t: t.assign(y=1.0),
        [],
        r"column 'y': .*constant|constant.*'y'|'y'.*same value",
    ),
    "one class only": (
        lambda t: t.assign(y="yes"),
        ["likelihood.kind=categorical"],
        r"only one class|one class",
    ),
    "a class absent from the training part": (
        lambda t: t.assign(
            y=["no" if i < 50 else "yes" for i in range(len(t))],
            part=["train"] * 50 + ["test"] * (len(t) - 50),
        ),
        ["likelihood.kind=categorical", "data.split.column=part"],
        r"class.*'yes'.*train|train.*'yes'",
    ),
    "fewer rows than a batch": (
        lambda t: t,
        ["ensemble.batch_size=50"],
        r"42 rows, fewer than the batch size of 50",
    ),
    "no such target": (
        lambda t: t,
        ["data.target=yy"],
        r"'yy'.*did you mean 'y'",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_bad_table(tiny, case):
    change, settings, message = TABLES[case]
    edit(tiny, change)
    with pytest.raises(InputError, match=message):
        start(tiny, *settings)
    assert not (tiny / "run").exists()


def test_several_bad_cells_are_all_named(tiny):
    edit(tiny, lambda t: put("b", 5, "x")(put("a", 2, "?")(t)))
    with pytest.raises(InputError) as caught:
        start(tiny)
    message = str(caught.value)
    assert "line 4, column 'a'" in message
    assert "line 7, column 'b'" in message


def test_the_command_line_prints_one_readable_error(tiny, cli):
    for arguments, words in (
        (("run", "absent.toml"), "absent.toml: no such experiment file"),
        (("run", "tinny.toml"), "did you mean tiny.toml"),
        (("check", "tiny.toml", "--set", "data.path=tabel.csv"), "did you mean table.csv"),
        (("run", "tiny.toml", "--set", "sampler.drawz=5"), "did you mean 'draws'"),
        (("resume", "."), "not a run folder"),
        (("diagnose", "nowhere"), "no such run folder"),
        (("run", "tiny.toml", "--time-budget", "soon"), "expected a time such as"),
    ):
        code, out, err = cli(*arguments, cwd=tiny)
        assert code == 2, (arguments, out, err)
        said = [line for line in err.splitlines() if not line.endswith(" ...")]
        assert said[0].startswith("error: ")
        assert words in err
        assert "Traceback" not in err
        assert out == ""


def test_all_mistakes_of_a_config_at_once(tiny):
    (tiny / "tiny.toml").write_text(
        """
[data]
path = "table.csv"
targt = "y"
[model]
hidden = "16"
[sampler]
kernel = "mclmc"
draws = 0
num_leapfrog = 3
[sampling]
"""
    )
    with pytest.raises(InputError) as caught:
        read_config(tiny / "tiny.toml")
    message = str(caught.value)
    assert "5 mistakes" in message
    assert "data.targt: unknown key; did you mean 'target'?" in message
    assert "model.hidden: found '16'" in message
    assert "sampler.draws: found 0" in message
    assert "sampler.num_leapfrog: unknown key" in message
    assert "sampling: unknown key; did you mean 'sampler'?" in message


NETWORKS = """
import jax, jax.numpy as jnp
from bnnmcmc import Network

def three(features, outputs):
    return Network(lambda key: {"w": jnp.zeros((features, 3))}, lambda p, x: x @ p["w"])

def broken(features, outputs):
    return Network(
        lambda key: {"w": jnp.zeros((features, outputs))}, lambda p, x: x @ p["w"] + jnp.log(-1.0)
    )

def fails(features, outputs):
    raise RuntimeError("no GPU")

def wrong(features, outputs):
    return 5
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three", r"outputs have shape \(48, 3\).*needs an array of shape \(48, 2\)"),
        ("broken", r"member 0 .*at the start position the log-likelihood is not finite"),
        ("fails", r"fails\(4, 2\) failed: RuntimeError: no GPU"),
        ("wrong", r"returned a int, expected a bnnmcmc\.Network"),
        ("absent", r"has no 'absent'"),
    ],
)
def test_bad_network(tiny, monkeypatch, name, message):
    (tiny / "my_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tiny)
    text = (tiny / "tiny.toml").read_text()
    text = text.replace('hidden = [6]\nactivation = "tanh"', f'network = "my_networks:{name}"')
    (tiny / "tiny.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        start(tiny)
    assert not (tiny / "run").exists()


def test_a_network_of_the_users_own_runs(tiny, monkeypatch):
    (tiny / "our_networks.py").write_text(
        """
import jax
from bnnmcmc import Network

def linear(features, outputs):
    def init(key):
        return {"w": 0.1 * jax.random.normal(key, (features, outputs))}
    return Network(init, lambda params, x: x @ params["w"])
"""
    )
    monkeypatch.chdir(tiny)
    text = (tiny / "tiny.toml").read_text()
    text = text.replace('hidden = [6]\nactivation = "tanh"', 'network = "our_networks:linear"')
    (tiny / "tiny.toml").write_text(text)
    assert start(tiny)
    draws = Run.open(tiny / "run").load_draws()
    assert draws["network"]["w"].shape == (3, 40, 4, 2)


def test_output_folder_in_use(tiny, finished):
    shutil.copytree(finished / "run", tiny / "run")
    with pytest.raises(InputError, match=r"already holds a run; go on with it \(bnnmcmc resume"):
        start(tiny)
    shutil.rmtree(tiny / "run")
    (tiny / "run").mkdir()
    (tiny / "run" / "thesis.docx").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty \(it holds 'thesis\.docx'\)"):
        start(tiny)
    shutil.rmtree(tiny / "run")
    (tiny / "run").mkdir()
    (tiny / "run" / "config.toml").write_text("# mine")
    with pytest.raises(InputError, match=r"is not empty \(it holds 'config\.toml'\)"):
        start(tiny)
    shutil.rmtree(tiny / "run")
    (tiny / "run").write_text("a file")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        start(tiny)


def test_too_many_draws_for_the_disk(tiny):
    with pytest.raises(InputError, match=r"the draws need .* GB .*lower sampler\.draws"):
        start(tiny, "sampler.draws=1000000000000")
    assert not (tiny / "run").exists()


@pytest.fixture
def copied(tmp_path, finished):
    return shutil.copytree(finished / "run", tmp_path / "run")


def test_store_cut_short(copied):
    chunk = max(copied.glob("draws/network.layer0.weight/c/**/*"), key=lambda p: p.is_file())
    content = chunk.read_bytes()
    chunk.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"draws: damaged|do not match their checksum"):
        Run.open(copied)


def test_store_edited(copied):
    chunk = max(copied.glob("draws/network.layer0.weight/c/**/*"), key=lambda p: p.is_file())
    content = bytearray(chunk.read_bytes())
    content[10] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"do not match their checksum in manifest\.json"):
        Run.open(copied)


def test_checkpoint_or_members_edited(copied):
    state = next((copied / "state").iterdir())
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"does not match its checksum"):
        resume_run(copied, console=QUIET, draws=5)
    members = copied / "ensemble" / "members.npz"
    members.write_bytes(members.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"members\.npz.*does not match its checksum"):
        Run.open(copied)


def test_resume_with_changed_config(copied):
    config = copied / "config.toml"
    config.write_text(config.read_text().replace("draws = 40", "draws = 50"))
    with pytest.raises(InputError, match=r"config\.toml: changed since the run began"):
        resume_run(copied, console=QUIET)


def test_resume_with_changed_data(copied):
    with np.load(copied / "data.npz") as file:
        arrays = dict(file)
    arrays["x"][0, 0] += 1
    np.savez(copied / "data.npz", **arrays)
    with pytest.raises(InputError, match=r"data\.npz or scaling\.json: changed since the run"):
        resume_run(copied, console=QUIET)


def test_resume_with_other_versions(copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["jax"] = "0.1.0"
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"begun with jax 0\.1\.0 \(now .*--other-versions"):
        resume_run(copied, console=QUIET, draws=1)
    assert resume_run(copied, console=QUIET, draws=1, other_versions=True)
    assert Run.open(copied).draws.draws == 41


def test_run_without_draws_yet(copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "blocks": [], "stage": "warmup"}))
    with pytest.raises(InputError, match=r"holds no draws yet \(its stage is 'warmup'\)"):
        Run.open(copied)
    with pytest.raises(InputError, match="holds no draws yet"):
        refresh_results(copied)


def test_predict_with_missing_or_unknown_cells(finished):
    run = Run.open(finished / "run")
    table = pd.read_csv(finished / "table.csv").head(3)
    with pytest.raises(InputError, match=r"feature columns 'b' are missing.*found 'a', 'kind'"):
        run.predict(table[["a", "kind"]])
    with pytest.raises(InputError, match=r"column 'kind': found the category 'blue'"):
        run.predict(table.assign(kind="blue"))
    with pytest.raises(InputError, match=r"column 'a': found a missing value"):
        run.predict(table.assign(a=[1.0, np.nan, 2.0]))
    with pytest.raises(InputError, match="the table has no rows"):
        run.predict(table.head(0))
    # Other order, further columns: no mistake.
    straight = run.predict(table)
    shuffled = run.predict(table[["y", "kind", "b", "a"]].assign(more=1))
    np.testing.assert_array_equal(shuffled.mean, straight.mean)


def test_disk_full_keeps_what_is_committed(tiny, here):
    # A limit on the size of files stands for a full disk: writing fails in the same way.
    settings = ["sampler.draws=1000", "run.block_draws=50", "sampler.thin=1"]
    command = [sys.executable, "-m", "bnnmcmc", "run", "tiny.toml", "--out", "run", "--set"]
    # The compilation cache meets the limit first, and is then not used.
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 48; exec "$0" "$@"', *command, *settings],
        cwd=tiny,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "go on with `bnnmcmc resume`" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tiny / "run" / "manifest.json").read_text())["stage"] == "sampling"
    code, _, err = here("resume", "run", "--quiet", cwd=tiny)
    assert code == 0, err
    assert Run.open(tiny / "run").draws.draws == 1000
