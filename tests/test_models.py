"""Models: what is found, imported and fetched."""

import hashlib
import http.server
import threading
from dataclasses import replace

import pytest

from faceage.agers.registry import model_programs
from faceage.checkpoint import Header, load, read_header, save
from faceage.engines import export
from faceage.errors import CheckpointError
from faceage.models import BUNDLED_MODELS, facenet_file, fetch, find_model, import_model, list_models, user_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_imported_model_is_found(cache, checkpoints):
    files = import_model("mine", list(checkpoints.values()))
    assert files == find_model("mine")
    assert list_models() == [*BUNDLED_MODELS, "mine"]
    assert {path.parent for path in files.paths.values()} == {user_folder() / "mine"}
    assert {role: read_header(path).arch for role, path in files.paths.items()} == {
        "generator": "age-cgan-generator",
        "encoder": "age-cgan-encoder",
        "age": "age-estimator",
        "identity": "identity",
    }


def test_an_imported_facegan_takes_the_bundled_readers(cache, facegan_checkpoint):
    files = import_model("mine", [facegan_checkpoint])
    assert files == find_model("mine")
    assert files.architecture == "facegan"
    assert files.generator.read_bytes() == facegan_checkpoint.read_bytes()
    assert (files.age, files.identity) == (find_model("age-cgan").age, find_model("age-cgan").identity)


def test_graphs_of_bundled_weights_are_not_made_again(cache, monkeypatch):
    files = find_model("age-cgan")

    def fail(program):
        raise AssertionError(f"{program.name} is exported again")

    monkeypatch.setattr("faceage.engines.export.write_graph", fail)
    mine = import_model("mine", [files.generator, files.paths["encoder"]])
    for role, program in model_programs(mine).items():
        assert program.fingerprint == model_programs(files)[role].fingerprint
        assert role == "age" or program.graph.parent == mine.generator.parent


def test_an_import_takes_the_place_of_another_architecture(cache, checkpoints, facegan_checkpoint):
    import_model("mine", [facegan_checkpoint, checkpoints["identity"]])
    assert import_model("mine", list(checkpoints.values())).architecture == "age-cgan"
    assert import_model("mine", [facegan_checkpoint]).architecture == "facegan"
    files = {path.name for path in (user_folder() / "mine").iterdir()}
    graphs = {f"facegan-{size}{suffix}" for size in (128, 192) for suffix in (".onnx", ".json")}
    assert files == {"facegan.safetensors", *graphs}
    assert [path.name for path in user_folder().iterdir()] == ["mine"]
    assert list_models() == [*BUNDLED_MODELS, "mine"]


def test_a_model_is_of_one_architecture(cache, checkpoints, facegan_checkpoint):
    message = "holds age-cgan-encoder; expected one checkpoint each of facegan, age-estimator, identity"
    with pytest.raises(CheckpointError, match=message):
        import_model("mine", [facegan_checkpoint, checkpoints["age-cgan-encoder"]])
    assert list_models() == list(BUNDLED_MODELS)


def test_an_unknown_model_is_refused_with_the_list(cache):
    with pytest.raises(
        CheckpointError, match=r'unknown model "other"; there are age-cgan, facegan, space; add one with'
    ):
        find_model("other")


def test_an_import_into_a_folder_that_cannot_be_written_is_one_line(facegan_checkpoint, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"stored in .*mine \(Not a directory\); set FACEAGE_CACHE to a folder"):
        import_model("mine", [facegan_checkpoint])


@pytest.mark.parametrize("name", [*BUNDLED_MODELS, "../up", "", "a b"])
def test_a_bad_name_is_refused(cache, checkpoints, name):
    with pytest.raises(CheckpointError, match="cannot name a model"):
        import_model(name, list(checkpoints.values()))


def test_the_generator_and_its_encoder_are_needed(cache, checkpoints):
    with pytest.raises(CheckpointError, match="the model lacks age-cgan-encoder"):
        import_model("mine", [checkpoints["age-cgan-generator"]])
    assert list_models() == list(BUNDLED_MODELS)


def test_two_files_of_one_role_are_refused(cache, checkpoints):
    generator = checkpoints["age-cgan-generator"]
    with pytest.raises(CheckpointError, match=r"holds age-cgan-generator; expected one checkpoint each of"):
        import_model("mine", [generator, generator])


def test_an_encoder_of_another_generator_is_refused(cache, checkpoints, tmp_path):
    import torch

    dims = read_header(checkpoints["age-cgan-encoder"]).dims
    header = Header(arch="age-cgan-encoder", dims=dims, stage="test", images_seen=0, parents={"gan": "0" * 64})
    save(tmp_path / "encoder.safetensors", {"w": torch.zeros(1)}, header)
    with pytest.raises(CheckpointError, match="the encoder was not trained for"):
        import_model("mine", [checkpoints["age-cgan-generator"], tmp_path / "encoder.safetensors"])


@pytest.mark.parametrize("change", [{"latent": 7}, {"encoder_channels": []}, {"new": 1}, None])
def test_dims_of_no_network_are_refused(cache, checkpoints, tmp_path, change):
    header, weights = load(checkpoints["age-cgan-encoder"], "age-cgan-encoder")
    dims = {} if change is None else header.dims | change
    save(tmp_path / "encoder.safetensors", weights, replace(header, dims=dims))
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors describe no network|holds other weights"):
        import_model("mine", [checkpoints["age-cgan-generator"], tmp_path / "encoder.safetensors"])
    assert not (cache / "models" / "mine").exists()


def test_a_damaged_checkpoint_is_refused(cache, checkpoints):
    files = import_model("mine", list(checkpoints.values()))
    files.generator.write_bytes(files.generator.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged or not safetensors"):
        find_model("mine")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small file in the place of FaceNet, on a server of this machine."""
    import torch

    source = tmp_path / "served.pt"
    torch.save({"conv.weight": torch.ones(2, 3), "logits.weight": torch.zeros(4, 2)}, source)
    data = source.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(fetch, "FACENET_URL", f"http://127.0.0.1:{server.server_port}/facenet.pt")
    monkeypatch.setattr(fetch, "FACENET_SHA256", hashlib.sha256(data).hexdigest())
    yield data
    server.shutdown()
    server.server_close()
    thread.join()


def test_facenet_is_fetched_checked_and_converted(cache, served, monkeypatch):
    from safetensors.numpy import load_file

    seen, graphs = [], []
    monkeypatch.setattr(export, "write_graph", lambda program: graphs.append(program.graph.name))
    path = fetch.fetch_facenet(lambda done, total: seen.append(done))
    assert path == facenet_file() == user_folder() / "facenet" / "facenet.safetensors"
    assert seen[-1] == len(served)
    assert list(load_file(path)) == ["conv.weight"]  # without the classifier
    assert graphs == ["facenet-64.onnx"]  # for the faces that the bundled identity network would get
    assert read_header(path).arch == "facenet"
    assert [p.name for p in path.parent.iterdir()] == ["facenet.safetensors"]
    assert list_models() == list(BUNDLED_MODELS)  # it is no model of its own


def test_a_download_that_differs_leaves_nothing(cache, served, monkeypatch):
    monkeypatch.setattr(fetch, "FACENET_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"with SHA-256 [0-9a-f]{64}, expected 111,898,327 with 0000"):
        fetch.fetch_facenet()
    assert list(facenet_file().parent.iterdir()) == []


def test_no_network_is_one_clear_line(cache, monkeypatch):
    monkeypatch.setattr(fetch, "FACENET_URL", "http://127.0.0.1:9/facenet.pt")  # the discard port: refused
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(.*refused\); check the network"):
        fetch.fetch_facenet()
    assert list(facenet_file().parent.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(served, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FACEAGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set FACEAGE_CACHE to a folder that can be written"):
        fetch.fetch_facenet()
