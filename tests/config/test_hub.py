"""Names of hub models in recipes: what counts as one, what is on this machine, and downloading from a hub."""

from __future__ import annotations

import pytest
from hub_server import COMMIT, hub

from megatron_hdpo.config import load_recipe
from megatron_hdpo.config.hub import HubError, HubModel


@pytest.fixture
def folder(tmp_path):
    """The repository's files; `original.bin` is one that nothing here reads."""
    files = tmp_path / "repository"
    files.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "original.bin"):
        (files / name).write_text(f"this is {name}")
    return files


def use(monkeypatch, url: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of models; nobody answers at the hub's address until a test sets it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    use(monkeypatch, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", HubModel("Qwen/Qwen2.5-7B-Instruct")),
        ("org/name@v1.0", HubModel("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubModel("org/name", "refs/pr/3")),
        ("name", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("a/b/c", None),
        ("org/name@", None),
        ("org/my name", None),
    ],
)
def test_what_names_a_hub_model(path, model):
    assert HubModel.named(path) == model


def test_a_folder_is_no_hub_model(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert HubModel.named("models/tiny") is None


def test_a_download_is_found_later_without_a_hub(cache, folder, monkeypatch):
    model = HubModel("org/tiny")
    assert model.snapshot() is None
    with hub({"org/tiny": folder}) as (url, asked):
        use(monkeypatch, url)
        snapshot = model.download()
        downloaded = len(asked)
        assert model.snapshot() == snapshot
        assert len(asked) == downloaded
    assert snapshot.name == COMMIT
    assert sorted(file.name for file in snapshot.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (snapshot / "config.json").read_text() == "this is config.json"
    assert HubModel("org/tiny", COMMIT).snapshot() == snapshot
    assert HubModel("org/tiny", "other").snapshot() is None


def test_a_model_that_the_hub_lacks_is_an_error(cache, folder, monkeypatch):
    with hub({"org/tiny": folder}) as (url, _):
        use(monkeypatch, url)
        with pytest.raises(HubError, match=r"^org/tny cannot be downloaded: [^\n]*; check its name, the network"):
            HubModel("org/tny").download()


def test_recipes_get_the_folder_of_a_snapshot(cache, folder, monkeypatch, tree, write_recipe):
    tree["model"]["path"] = "org/tiny"
    recipe = write_recipe(tree)
    assert load_recipe(recipe).model.path == "org/tiny"
    with hub({"org/tiny": folder}) as (url, _):
        use(monkeypatch, url)
        snapshot = HubModel("org/tiny").download()
    teacher = "teacher={kind: external, path: org/tiny}"
    loaded = load_recipe(recipe, ["objective={name: opd}", teacher])
    assert (loaded.model.path, loaded.teacher.path) == (str(snapshot), str(snapshot))
    assert load_recipe(recipe, snapshots=False).model.path == "org/tiny"
