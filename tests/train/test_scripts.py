"""The training scripts end to end, in seconds: small networks, a few steps each, on the tiny archive."""

import importlib
import json
import logging
import math
import shutil
import types
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import FILES, draw_nothing, module_name, shrink_networks

from faceage.checkpoint import load, read_header, sha256_of
from faceage.networks.age_cgan import AgeCGANDims, Encoder, Generator
from faceage.networks.regressors import AgeEstimator, IdentityNet, TrunkDims

SCRIPTS = {
    "identity": ("identity", IdentityNet, TrunkDims, ("step",), 64),
    "gan": ("age-cgan-generator", Generator, AgeCGANDims, ("G_step", "D_step"), 32),
    "age_estimator": ("age-estimator", AgeEstimator, TrunkDims, ("step",), 64),
    "encoder": ("age-cgan-encoder", Encoder, AgeCGANDims, ("step",), 32),
}
"""Script -> architecture, network, dimensions, optimizers, batch; in the order in which they can run."""
FOLDERS = {"identity": "identity", "gan": "gan", "age_estimator": "age", "encoder": "encoder"}
"""Where train.bundle looks for each."""


def invoke(script, *args):
    module = importlib.import_module(module_name(script))
    result = CliRunner().invoke(module.main, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def refused(script, *args):
    """Run a script that must end with one line and exit code 1."""
    module = importlib.import_module(module_name(script))
    result = CliRunner().invoke(module.main, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    return result


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Make the networks small, and the clock go 0.05 s each time that it is read."""
    now = [0.0]

    def monotonic():
        now[0] += 0.05
        return now[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.time", types.SimpleNamespace(monotonic=monotonic))
        shrink_networks(patch)
        draw_nothing(patch)
        yield


@pytest.fixture(scope="module")
def runs(archive, cache, teacher, tmp_path_factory):
    """The folder of the four scripts' run folders, after 0.02 minutes each."""
    folder = tmp_path_factory.mktemp("runs")
    for script in SCRIPTS:
        train(script, folder, folder / FOLDERS[script], 0.02, archive, cache, teacher)
    return folder


def train(script, runs, out, minutes, archive, cache, teacher):
    inputs = {
        "identity": ("--teacher", teacher),
        "gan": ("--identity", runs / "identity" / FILES["identity"]),
        "age_estimator": (),
        "encoder": (
            *("--generator", runs / "gan" / FILES["gan"]),
            *("--identity", runs / "identity" / FILES["identity"]),
        ),
    }[script]
    common = ("--data", archive, "--cache", cache, "--out", out, "--minutes", minutes)
    return invoke(script, *common, *inputs)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_a_checkpoint_a_log_and_its_configuration(runs, script):
    folder = runs / FOLDERS[script]
    arch, network, dims, _, batch = SCRIPTS[script]
    header, weights = load(folder / FILES[script], arch)
    network(dims(**header.dims)).load_state_dict(weights)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert header.stage == script
    assert header.dataset["name"] == "UTKFace"
    assert header.images_seen > 0
    assert header.images_seen % batch == 0
    assert header.train_config == json.loads((folder / "config.json").read_text())

    (line,) = log_of(folder)
    assert len(line) >= 4
    assert all(math.isfinite(value) for value in line.values())
    assert line["images"] == header.images_seen
    assert {key: round(value, 5) for key, value in header.metrics.items()}.items() <= line.items()
    assert (script == "gan") == (not header.metrics)


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoint_holds_the_averaged_weights(runs, script):
    folder = runs / FOLDERS[script]
    state = torch.load(folder / "resume.pt", weights_only=True)
    _, weights = load(folder / FILES[script], SCRIPTS[script][0])
    averaged = state["G_ema" if script == "gan" else "ema"]
    assert averaged.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(value, averaged[name].cpu(), err_msg=name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_more_minutes_go_on_where_the_run_stopped(runs, archive, cache, teacher, tmp_path, caplog, script):
    out = tmp_path / "run"
    shutil.copytree(runs / FOLDERS[script], out)
    (first,) = log_of(out)
    caplog.set_level(logging.INFO)

    train(script, runs, out, 0.02, archive, cache, teacher)
    assert log_of(out) == [first]  # the budget is used up

    train(script, runs, out, 0.05, archive, cache, teacher)
    assert f"resumed {out} after {first['images']} images" in caplog.messages
    _, last = log_of(out)
    assert last["images"] > first["images"]
    assert last["seconds"] > 0.05 * 60 > first["seconds"] > 0.02 * 60
    assert read_header(out / FILES[script]).images_seen == last["images"]
    _, _, _, optimizers, batch = SCRIPTS[script]
    state = torch.load(out / "resume.pt", weights_only=True)
    for name in optimizers:  # they count their own steps, over both sessions
        steps = {int(values["step"]) for values in state[name]["state"].values()}
        assert steps == {last["images"] // batch}
    before = torch.load(runs / FOLDERS[script] / "resume.pt", weights_only=True)
    trained = "G" if script == "gan" else "E" if script == "encoder" else "net"
    counts = [name for name in state[trained] if name.endswith("num_batches_tracked")]
    assert counts
    assert all(state[trained][name] > before[trained][name] for name in counts)


@pytest.mark.parametrize("minutes", [0.0100, 0.0109, 0.0118, 0.0127])
def test_the_last_step_is_saved_wherever_the_time_runs_out(archive, cache, tmp_path, minutes):
    out = tmp_path / "age"
    invoke("age_estimator", "--data", archive, "--cache", cache, "--out", out, "--minutes", minutes)
    state = torch.load(out / "resume.pt", weights_only=True)
    assert state["seconds"] > minutes * 60
    assert read_header(out / FILES["age_estimator"]).images_seen == state["images_seen"] > 0


def test_every_tick_is_logged_and_saved(archive, cache, tmp_path, monkeypatch):
    from train.readers import age_estimator

    monkeypatch.setattr(age_estimator, "Config", partial(age_estimator.Config, tick_images=192))
    saved = []
    monkeypatch.setattr(age_estimator, "save", lambda path, weights, header: saved.append(header.images_seen))
    invoke("age_estimator", "--data", archive, "--cache", cache, "--out", tmp_path, "--minutes", 0.04)
    *ticks, last = (line["images"] for line in log_of(tmp_path))
    assert saved == [*ticks, last]
    assert ticks == [192 * (i + 1) for i in range(len(ticks))]
    assert len(ticks) >= 3
    assert 0 < last - ticks[-1] <= 192


def test_a_resumed_gan_logs_the_mean_of_its_own_steps(runs, archive, cache, teacher, tmp_path):
    shutil.copytree(runs / "gan", tmp_path / "gan")
    train("gan", runs, tmp_path / "gan", 0.025, archive, cache, teacher)
    first, last = log_of(tmp_path / "gan")
    assert last["images"] < 1.5 * first["images"]
    assert last["loss_D"] == pytest.approx(first["loss_D"], rel=0.4)  # near 2 before anything is learned


@pytest.mark.parametrize(("script", "shape"), [("gan", (4 * 64, 18 * 64, 3)), ("encoder", (4 * 64, 4 * 64, 3))])
def test_sheets_are_drawn(runs, script, shape):
    picture = cv2.imread(str(runs / script / "sheet.png"))
    assert picture.shape == shape
    assert picture.std() > 5


def test_encoder_sheet_shows_faces_above_reconstructions(runs, faces):
    picture = cv2.imread(str(runs / "encoder" / "sheet.png"))[:, :, ::-1]
    for top, rows in ((0, slice(0, 4)), (128, slice(4, 8))):  # there are eight validation faces
        row = np.concatenate(list(faces.val.pixels[rows]), 1)
        np.testing.assert_array_equal(picture[top : top + 64], row)


def test_parents_are_named_by_hash(runs, teacher):
    identity, generator = runs / "identity" / FILES["identity"], runs / "gan" / FILES["gan"]
    assert read_header(identity).parents == {"teacher": sha256_of(teacher)}
    assert read_header(generator).parents == {"identity": sha256_of(identity)}
    parents = read_header(runs / "encoder" / FILES["encoder"]).parents
    assert parents == {"gan": sha256_of(generator), "identity": sha256_of(identity)}


@pytest.mark.parametrize(
    ("generator", "identity", "message"),
    [
        ("identity", "identity", "holds identity, expected age-cgan-generator"),
        ("gan", "gan", "holds age-cgan-generator, expected identity"),
    ],
)
def test_encoder_refuses_the_wrong_checkpoint(runs, archive, cache, tmp_path, generator, identity, message):
    files = {name: runs / FOLDERS[name] / FILES[name] for name in FOLDERS}
    inputs = ("--data", archive, "--cache", cache, "--generator", files[generator], "--identity", files[identity])
    result = refused("encoder", *inputs, "--out", tmp_path / "out")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [64, 128])
def test_dry_run_shows_the_configuration_and_writes_nothing(archive, tmp_path, monkeypatch, size):
    monkeypatch.setattr("train.age_cgan.gan.AgeCGANDims", AgeCGANDims)
    result = invoke("gan", "--data", archive, "--out", tmp_path / "out", "--size", size, "--dry-run")
    assert "generator_rate=0.0002" in result.stderr
    assert f"size_px={size}" in result.stderr
    assert not list(tmp_path.iterdir())


def test_one_command_runs_every_step_in_order(archive, teacher, cache, tmp_path, monkeypatch):
    from train.__main__ import SHARES, main

    made, ran = [], []
    exports = {"identity": "identity", "judge": "judge", "gan": "generator", "encoder": "encoder", "aging": "generator"}
    exports |= {"stylegan": "stylegan", "make_pairs": "pairs", "facegan": "facegan"}

    def run(command, check):
        _, _, module, *args = command
        context = importlib.import_module(module).main.make_context(module, list(args))  # a call that the script takes
        ran.append(module)
        out = context.params.get("out")
        if out is not None:  # leave what the step would, so that the next one finds its inputs
            out.mkdir(parents=True, exist_ok=True)
            stem = exports.get(module.split(".")[-1], "age-estimator" if "age" in module else "encoder")
            made.extend([out / f"{stem}.safetensors", out / "encoder.safetensors"])
            for file in made[-2:]:
                file.touch()
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr("train.__main__.subprocess.run", run)
    arguments = [
        "--data",
        str(archive),
        "--teacher",
        str(teacher),
        "--cache",
        str(cache),
        "--runs",
        str(tmp_path / "r"),
    ]
    assert CliRunner().invoke(main, [*arguments, "--hours", "2"]).exit_code == 0
    assert len(ran) == len(SHARES) + 3
    assert ran[-6:-2] == [
        "train.age_cgan.aging",
        "train.facegan.stylegan",
        "train.facegan.make_pairs",
        "train.facegan.facegan",
    ]
    assert ran[-2:] == ["train.age_cgan.curvature", "train.bundle"]
    assert sum(SHARES.values()) == pytest.approx(1)
    result = CliRunner().invoke(main, [*arguments, "--hours", "3"])
    assert result.exit_code == 1
    assert "was started with --hours 2, now it is 3" in result.output
    assert len(ran) == len(SHARES) + 3


def test_gan_trains_without_an_identity_network(archive, cache, tmp_path):
    invoke("gan", "--data", archive, "--cache", cache, "--out", tmp_path / "gan", "--minutes", 0.005)
    assert read_header(tmp_path / "gan" / FILES["gan"]).parents == {}


def test_teacher_embeddings_follow_faces_and_mirrors(archive, cache, faces, teacher, tmp_path):
    from train.data import read_archive, warp_faces
    from train.readers.identity import teacher_embeddings
    from train.readers.teacher import TEMPLATE_96X112, embed, load_teacher

    embeddings = teacher_embeddings(archive, teacher, faces, tmp_path)
    assert embeddings.shape == (2, len(faces), 128)
    np.testing.assert_allclose(embeddings.norm(dim=2), 1, atol=0.01)
    data = dict(read_archive(archive))
    pictures = [cv2.imdecode(np.frombuffer(data[name], np.uint8), cv2.IMREAD_COLOR) for name in faces.names]
    aligned = warp_faces(pictures, faces.landmarks, TEMPLATE_96X112, 96, 112)[..., ::-1]
    for side, pixels in ((0, aligned), (1, aligned[:, :, ::-1])):
        np.testing.assert_array_equal(embed(load_teacher(teacher), pixels), embeddings[side])
    assert (embeddings[0] != embeddings[1]).any(1).all()
    few = faces.rows(np.array([7, 2]))  # in another order
    np.testing.assert_allclose(teacher_embeddings(archive, teacher, few, tmp_path), embeddings[:, [7, 2]], atol=0.02)
    assert len(list(tmp_path.iterdir())) == 2


def test_degrade_softens_a_quarter():
    from train.augment import degrade

    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = degrade(x)
    assert out.shape == x.shape
    np.testing.assert_array_equal(out[4:], x[4:])
    assert (out[:4].std((1, 2, 3)) < 0.7 * x[:4].std((1, 2, 3))).all()
    np.testing.assert_allclose(out[:4].mean((1, 2, 3)), x[:4].mean((1, 2, 3)), atol=0.05)


def latent_args(runs, archive, cache, teacher, out):
    paths = [(f"--{name}", runs / name / FILES[name]) for name in ("encoder", "identity")]
    generator = ("--generator", runs / "gan" / FILES["gan"])
    common = ("--data", archive, "--cache", cache, "--teacher", teacher, "--out", out)
    return (*common, *generator, *paths[0], *paths[1], "--faces", 4)


def test_latent_measures_every_choice(runs, archive, cache, teacher, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("train.age_cgan.latent._plot", lambda curves, path: drawn.append((set(curves), path.name)))
    invoke("latent", *latent_args(runs, archive, cache, teacher, tmp_path / "latent"))
    report = json.loads((tmp_path / "latent" / "latent.json").read_text())
    assert report["faces"] == 4
    assert set(report["results"]) == {"encoder", "pixel-wise", "identity-preserving", "both (product)"}
    for name, figures in report["results"].items():
        assert all(math.isfinite(value) for value in figures.values()), name
        assert -1 <= figures["teacher_cosine"] <= 1.01
        if name != "encoder":
            assert figures["loss"] < figures["loss_at_encoder"]
            adam = report["curves"][name]["Adam"]
            assert adam[-1][1] < adam[0][1]
            losses = [loss for _, loss in report["curves"][name]["in z"]]
            assert losses == sorted(losses, reverse=True)
    assert drawn == [({"pixel-wise", "identity-preserving", "both (product)"}, "curves.png")]
    assert cv2.imread(str(tmp_path / "latent" / "sheet.png")).shape == (5 * 128, 4 * 128, 3)


def test_curves_are_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    from train.age_cgan.latent import _plot

    track = [(0.1, 3.0), (0.2, 2.0)]
    _plot({name: {"L-BFGS": track, "Adam": track} for name in ("a", "b")}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def finished(runs, archive, cache, facegan_checkpoint, tmp_path):
    """Run folders as bundle wants them: the aged generator, the encoder with the curvature, and a FaceGAN."""
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    (folder / "facegan").mkdir()
    shutil.copy(facegan_checkpoint, folder / "facegan")
    reader = folder / "reader"
    invoke("age_estimator", "--data", archive, "--cache", cache, "--out", reader, "--minutes", 0.01, "--half", 0)
    readers = ("--reader", reader / FILES["age_estimator"])
    gan = ("--gan", runs / "gan", "--encoder", runs / "encoder" / FILES["encoder"])
    identity = ("--identity", runs / "identity" / FILES["identity"])
    common = ("--data", archive, "--cache", cache)
    invoke("aging", *common, "--out", folder / "aging", "--minutes", 0.02, *gan, *identity, *readers)
    aged = (f"--{name}={folder / 'aging' / f'{name}.safetensors'}" for name in ("generator", "encoder"))
    invoke("curvature", *common, "--out", folder / "curvature", *aged, *identity, "--faces", 2)
    return folder


def test_curvature_is_stored_in_a_copy_of_the_encoder(finished):
    _, before = load(finished / "aging" / "encoder.safetensors", "age-cgan-encoder")
    _, after = load(finished / "curvature" / "encoder.safetensors", "age-cgan-encoder")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"latent_root"}


def test_bundle_halves_weights_and_renames_parents(finished, tmp_path, monkeypatch):
    graphs = []

    def write_graph(program):  # a real one takes seconds; see test_one_network_is_bundled_alone
        program.graph.touch()
        graphs.append(program.name)
        return {"parity_with_torch": {}}

    monkeypatch.setattr("train.bundle.TARGET", tmp_path / "models")
    monkeypatch.setattr("train.bundle.write_graph", write_graph)
    result = invoke("bundle", "--runs", finished)
    models = tmp_path / "models"
    archs = {"facegan", *(arch for arch, *_ in SCRIPTS.values())}
    assert len(result.stdout.splitlines()) == len(archs) + len(graphs)
    assert sorted(graphs) == [
        "age-cgan-encoder", "age-cgan-generator", "age-cgan-latent", "age-estimator", "facegan-128", "facegan-192",
        "identity",
    ]  # fmt: skip
    assert {file.name for file in models.glob("*.safetensors")} == {f"{arch}.safetensors" for arch in archs}
    folders = FOLDERS | {"gan": "aging", "encoder": "curvature"}
    for script, (arch, *_) in SCRIPTS.items():
        original, bundled = finished / folders[script] / FILES[script], models / f"{arch}.safetensors"
        assert bundled.stat().st_size < original.stat().st_size
        _, weights = load(original, arch)
        _, halved = load(bundled, arch)
        for name, value in weights.items():
            expected = value.half().float() if value.is_floating_point() else value
            np.testing.assert_array_equal(halved[name], expected, err_msg=name)
    hashes = {arch: sha256_of(models / f"{arch}.safetensors") for arch, *_ in SCRIPTS.values()}
    assert read_header(models / "age-cgan-encoder.safetensors").parents == {
        "gan": hashes["age-cgan-generator"],
        "identity": hashes["identity"],
    }
    parents = read_header(models / "age-cgan-generator.safetensors").parents
    assert parents.keys() == {"gan", "discriminator", "encoder", "identity", "reader0"}
    assert parents["identity"] == hashes["identity"]


def test_one_network_is_bundled_alone(facegan_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("train.bundle.TARGET", tmp_path / "models")
    (tmp_path / "facegan").mkdir()
    shutil.copy(facegan_checkpoint, tmp_path / "facegan")
    result = invoke("bundle", "--runs", tmp_path, "facegan")
    assert result.stdout.startswith("facegan.safetensors: ")
    names = {"facegan.safetensors", *(f"facegan-{px}.{end}" for px in (128, 192) for end in ("onnx", "json"))}
    assert {file.name for file in (tmp_path / "models").iterdir()} == names
    _, halved = load(tmp_path / "models" / "facegan.safetensors", "facegan")
    assert halved["to_luma.weight"].abs().max() > 0


def test_bundle_refuses_a_checkpoint_in_the_wrong_place(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("train.bundle.TARGET", tmp_path / "models")
    shutil.copy(finished / "gan" / FILES["gan"], finished / "identity" / FILES["identity"])
    result = refused("bundle", "--runs", finished)
    assert "holds age-cgan-generator, expected identity" in result.stderr
    assert not (tmp_path / "models").exists()


def test_aging_refuses_an_estimator_that_may_know_the_judges_pictures(runs, archive, cache, tmp_path):
    gan = ("--gan", runs / "gan", "--encoder", runs / "encoder" / FILES["encoder"])
    identity = ("--identity", runs / "identity" / FILES["identity"])
    common = ("--data", archive, "--cache", cache, "--out", tmp_path / "aging")
    result = refused("aging", *common, *gan, *identity, "--reader", runs / "age" / FILES["age_estimator"])
    assert "did not learn from half 0 alone" in result.stderr
