"""Importing: what a trainer left behind, what a download brought, and what another registry exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplex_registry.errors import UnsupportedAdapterError
from loraplex_registry.exchange.peft_import import collect
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import validate_adapter
from tests.registry import builders
from tests.registry.shell import Shell, failing


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


@pytest.fixture
def downloaded(adapter: Path) -> Path:
    """An adapter among everything that trainers and hubs leave beside one."""
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\nan adapter")
    (adapter / "LICENSE").write_text("Apache-2.0")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "trainer_state.json"):
        (adapter / name).write_text("{}")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "rng_state_0.pth",
        "odd.pkl",
        ".gitattributes",
        "weird\nname",
    ):
        (adapter / name).write_bytes(b"\x80")
    (adapter / ".git").mkdir()
    builders.make_adapter(adapter / "checkpoint-500", seed=5)
    return adapter


def test_what_matters_is_copied_and_the_rest_is_named_with_a_reason(
    downloaded: Path, target: Path, base: BaseModel
) -> None:
    found = collect(downloaded, target, base)
    assert {path.name for path in target.iterdir()} == set(found.copied)
    assert set(found.copied) == {"adapter_config.json", "adapter_model.safetensors", "README.md", "LICENSE"}
    reasons = dict(found.left)
    assert set(reasons) | set(found.copied) == {path.name for path in downloaded.iterdir()}
    assert "tokenizer" in reasons["tokenizer.json"]
    assert "training" in reasons["optimizer.pt"]
    assert "pickled" in reasons["odd.pkl"]
    assert "checkpoint" in reasons["checkpoint-500"]
    assert found.trained_on == "/somewhere/base"
    assert found.changed == ()
    validate_adapter(target, base)


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", "all-linear", "(" * 1000, "(a+)+$", ""])
def test_a_pattern_of_modules_becomes_the_names_that_have_weights(
    pattern: str, target: Path, tmp_path: Path, base: BaseModel
) -> None:
    source = builders.make_adapter(tmp_path / "x", config=builders.adapter_config(target_modules=pattern))
    found = collect(source, target, base)
    config = json.loads((target / "adapter_config.json").read_bytes())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert len(found.changed) == 1
    validate_adapter(target, base)


def test_a_pattern_that_took_some_layers_only_becomes_full_names(
    target: Path, tmp_path: Path, base: BaseModel
) -> None:
    tensors = {name: value for name, value in builders.adapter_tensors().items() if "layers.1." in name}
    source = builders.make_adapter(
        tmp_path / "x", tensors=tensors, config=builders.adapter_config(target_modules=r".*layers\.1\..*")
    )
    collect(source, target, base)
    config = json.loads((target / "adapter_config.json").read_bytes())
    assert config["target_modules"] == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    validate_adapter(target, base)


def refused(source: Path, target: Path, base: BaseModel) -> str:
    with pytest.raises(UnsupportedAdapterError) as caught:
        imported(source, target, base)
    return caught.value.message


def imported(source: Path, target: Path, base: BaseModel) -> None:
    collect(source, target, base)
    validate_adapter(target, base)


def test_a_pickled_adapter_is_refused_with_advice(adapter: Path, target: Path, base: BaseModel) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "safe_serialization=True" in refused(adapter, target, base)


def test_a_run_with_checkpoints_alone_names_them(tmp_path: Path, target: Path, base: BaseModel) -> None:
    builders.make_adapter(tmp_path / "run/checkpoint-500")
    assert "checkpoint-500" in refused(tmp_path / "run", target, base)


def test_a_whole_model_is_no_adapter(base_directory: Path, target: Path, base: BaseModel) -> None:
    assert "whole model" in refused(base_directory, target, base)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(missing: str, adapter: Path, target: Path, base: BaseModel) -> None:
    (adapter / missing).unlink()
    assert missing in refused(adapter, target, base)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"target_modules": None}, "target_modules"),
        ({"rank_pattern": {"^model.*": 8}}, "rank_pattern"),
        ({"new_setting": 1}, "new_setting"),
    ],
)
def test_a_setting_beyond_plain_lora_is_named(
    changes: dict[str, object], named: str, tmp_path: Path, target: Path, base: BaseModel
) -> None:
    source = builders.make_adapter(tmp_path / "x", config=builders.adapter_config(**changes))
    assert named in refused(source, target, base)


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
def test_a_link_that_leads_out_is_never_followed(
    name: str, adapter: Path, target: Path, tmp_path: Path, base: BaseModel
) -> None:
    (tmp_path / "secret").write_text("secret")
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(tmp_path / "secret")
    assert "link" in refused(adapter, target, base)
    assert all(b"secret" not in path.read_bytes() for path in target.iterdir())


def test_the_cache_of_hugging_face_is_read_through_its_links(
    adapter: Path, target: Path, tmp_path: Path, base: BaseModel
) -> None:
    repository = tmp_path / "models--acme--orders"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copytree(adapter, repository / "blobs")
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert set(collect(snapshot, target, base).copied) == {path.name for path in adapter.iterdir()}
    assert not any(path.is_symlink() for path in target.iterdir())


def test_a_pattern_for_more_modules_than_the_settings_can_name_is_refused(
    tmp_path: Path, target: Path, base: BaseModel
) -> None:
    tensors = {
        f"base_model.model.m{i}.{'x' * 200}.lora_A.weight": np.zeros((1, 1), np.float32) for i in range(600)
    }
    source = builders.make_adapter(
        tmp_path / "x", tensors=tensors, config=builders.adapter_config(target_modules=".*")
    )
    # Each of these names ends alike elsewhere in the base, so none can be shortened.
    wide = BaseModel("b", base.digest, {f"other.{'x' * 200}": (1, 1)}, 1, 1, 1)
    assert "list of module names" in refused(source, target, wide)


def test_an_oversized_or_empty_text_stays_behind(adapter: Path, target: Path, base: BaseModel) -> None:
    (adapter / "README.md").write_bytes(b"x" * ((256 << 10) + 1))
    (adapter / "LICENSE").write_bytes(b"")
    found = collect(adapter, target, base)
    assert {name for name, _ in found.left} == {"README.md", "LICENSE"}


# --- the command


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path / "home", {})
    shell.home.mkdir()
    builders.make_base(shell.home / "base")
    shell("init", "--tenant", "acme")
    return shell


def test_a_peft_directory_is_imported_in_one_command(shell: Shell, downloaded: Path) -> None:
    said = shell("import", downloaded, "acme/orders", "--base", "base", "--tag", "prod")
    assert "imported acme/orders@1" in said
    assert "'optimizer.pt': state of the training" in said
    assert r"'weird\nname'" in said
    again = shell.json("import", downloaded, "acme/orders", "--base", "base")
    assert (again["created"], again["trained_on"]) == (False, "/somewhere/base")
    assert {"name": "odd.pkl", "reason": "may hold pickled code"} in again["left"]
    assert shell.json("verify", "orders@prod")["digest"] == again["digest"]


def test_a_name_that_cannot_be_an_adapters_is_asked_for(shell: Shell, adapter: Path) -> None:
    shutil.copytree(adapter, shell.home / "My_Adapter V2")
    assert "TENANT/NAME" in failing(shell, 2, "INVALID_ARGUMENT", "import", "My_Adapter V2", "--base", "base")


def test_an_export_is_imported_elsewhere_without_a_key(shell: Shell, adapter: Path, tmp_path: Path) -> None:
    shell("push", adapter, "orders@1.0.0", "--base", "base", "--annotate", "licence=apache-2.0")
    exported = shell.json("export", "orders@1.0.0", "layout", "--oci")
    there = (tmp_path / "there").as_uri()
    assert shell.json("init", "--tenant", "acme", "--registry", there)["registry_created"]
    failing(shell, 4, "CONFLICT", "export", "orders@1.0.0", "layout")
    (shell.home / ".config/loraplex/keys/acme.key").unlink()
    assert "imported acme/orders@1.0.0" in shell("import", "layout", "--registry", there)
    again = shell.json("import", "layout", "acme/orders", "--registry", there)
    assert (again["created"], again["digest"]) == (False, exported["digest"])
    assert shell.json("verify", "acme/orders", "--registry", there)["digest"] == exported["digest"]
    shell("pull", "orders@1.0.0", "pulled")
    assert shell.json("import", "pulled", "--registry", there)["digest"] == exported["digest"]
    failing(shell, 2, "INVALID_ARGUMENT", "import", "layout", "acme/other", "--registry", there)
    failing(shell, 2, "INVALID_ARGUMENT", "import", "layout", "acme/orders@2.0.0", "--registry", there)


def test_an_import_never_replaces_a_version_of_other_content(
    shell: Shell, adapter: Path, tmp_path: Path
) -> None:
    shell("push", adapter, "orders@1.0.0", "--base", "base")
    shell("export", "orders@1.0.0", "layout")
    there = (tmp_path / "there").as_uri()
    other = builders.make_adapter(tmp_path / "other", seed=9)
    shell("push", other, "orders@1.0.0", "--base", "base", "--registry", there)
    failing(shell, 4, "CONFLICT", "import", "layout", "--registry", there)


def test_an_import_that_nobody_trusts_publishes_nothing(shell: Shell, adapter: Path, tmp_path: Path) -> None:
    shell("push", adapter, "orders", "--base", "base")
    shell("export", "orders", "layout")
    stranger = Shell(tmp_path / "stranger", {})
    stranger.home.mkdir()
    stranger("init", "--tenant", "acme")
    failing(stranger, 5, "SIGNATURE_INVALID", "import", shell.home / "layout")
    assert stranger.json("ls")["tenants"] == []


def test_the_weights_of_an_import_are_the_weights_that_were_trained(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "trained"
    source.mkdir()
    save_file(
        builders.adapter_tensors(seed=3), source / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    (source / "adapter_config.json").write_text(json.dumps(builders.adapter_config(target_modules=".*_proj")))
    shell("import", source, "orders", "--base", "base")
    shell("pull", "orders", "out")
    assert (shell.home / "out/adapter_model.safetensors").read_bytes() == (
        source / "adapter_model.safetensors"
    ).read_bytes()
