"""What of a merge may be shared: no path of this machine, a valid model card, and an upload of what was proven."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

import nsc
from nsc.cli import app
from nsc.errors import NSCError
from nsc.export import push as pushing
from nsc.export.sharing import PublicNames, difference, hub_id, overlaid, public_base
from tests.tiny import rewrite

TASKS = ("plain", "rslora")
TEXTS = (".json", ".md", ".yaml")


def naming(folder: Path, adapters, base: str | None, licence: str | None = None) -> dict[str, Path]:
    """Copies of adapters whose configs name this base, with a card under this licence."""
    made = {}
    for task in TASKS:
        made[task] = shutil.copytree(adapters[task], folder / task, dirs_exist_ok=True)
        config = json.loads((made[task] / "adapter_config.json").read_text())
        (made[task] / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        (made[task] / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "no header")
    return made


def merged_by(base, adapters, texts, out, *, full=False, base_id=None, **settings):
    texts = {task: texts[task] for task in TASKS}
    result = nsc.merge(base, adapters, texts, progress=False, **({"steps": 0} | settings))
    result.save(out, full=full, base_id=base_id)
    return result


def shared_texts(out: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in out.rglob("*") if p.suffix in TEXTS and p.name != "local.yaml"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, base, adapters, texts) -> Path:
    """A merge of local files: rows in a file, a start from another merge, and a base that has a name on the Hub."""
    home = tmp_path_factory.mktemp("shared")
    own = naming(home / "adapters", adapters, "org/model", "apache-2.0")
    rows = {}
    for task in TASKS:
        rows[task] = home / f"{task}.txt"
        rows[task].write_text("\n".join(texts[task]))
    nsc.merge(base, own, method="task-arithmetic", progress=False).save(home / "start")
    result = nsc.merge(base, own, rows, method="match", start_from=str(home / "start"), steps=1, progress=False)
    result.save(home / "out")
    return home / "out"


@pytest.mark.parametrize("full", [False, True])
def test_no_path_of_this_machine_is_in_what_is_shared(shared, base, tmp_path, full):
    nsc.apply(shared).save(out := tmp_path / "out", full=full, base_id="me/mine" if full else None)
    for name, text in (shared_texts(out) | ({} if full else shared_texts(shared))).items():
        for place in (base, shared.parent, tmp_path, Path.home()):
            assert str(place) not in text, name
    told = yaml.safe_load((out / "merge.yaml").read_text())
    assert told["base"] == ("me/mine" if full else "org/model") == json.loads((out / "report.json").read_text())["base"]
    assert full or json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"
    assert told["adapters"]["plain"]["path"] == "plain" and told["data"]["plain"] == "plain.txt"
    assert told["started"]["from"] == "start" == told["settings"]["start_from"]


def test_a_record_without_paths_is_replayed_here_and_elsewhere(shared, tmp_path):
    """Here the paths are in local.yaml; a copy that was shared takes them from the command line."""
    downloaded = shutil.copytree(shared, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("local.yaml"))
    with pytest.raises(NSCError, match=r"adapter plain.*--adapter plain=PATH"):
        nsc.apply(downloaded)
    moved = [f"{task}={shared.parent / 'adapters' / task}" for task in TASKS]
    arguments = [["apply", str(shared)], ["apply", str(downloaded), *(p for m in moved for p in ("--adapter", m))]]
    for i, command in enumerate(arguments):
        out = tmp_path / str(i)
        ran = CliRunner().invoke(app, [*command, "--out", str(out)])
        assert not ran.exception, ran.output
        again, before = load_file(out / "adapter_model.safetensors"), load_file(shared / "adapter_model.safetensors")
        assert again.keys() == before.keys() and all((again[k] == before[k]).all() for k in again)
        assert yaml.safe_load((out / "local.yaml").read_text())["adapters"]["plain"]["path"].endswith("adapters/plain")


def test_a_record_is_still_a_file_of_settings(shared, tmp_path):
    ran = CliRunner().invoke(app, ["merge", "--config", str(shared / "merge.yaml"), "--out", str(tmp_path / "again")])
    assert not ran.exception, ran.output
    before, again = (load_file(out / "coefficients.safetensors") for out in (shared, tmp_path / "again"))
    assert (before["coefficients"] == again["coefficients"]).all()


def test_what_the_hub_reads_of_an_adapter(shared):
    data = ModelCard.load(shared / "README.md").data
    assert data.base_model == "org/model" and data.base_model_relation == "adapter" and data.library_name == "peft"
    assert data.license == "apache-2.0" and data.pipeline_tag == "text-generation"
    assert {"lora", "merge", "base_model:adapter:org/model"} <= set(data.tags)


def test_what_the_hub_reads_of_a_whole_model(shared, tmp_path):
    nsc.apply(shared).save(out := tmp_path / "out", full=True)
    data = ModelCard.load(out / "README.md").data
    assert data.base_model == "org/model" and data.base_model_relation == "merge"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert "merge" in data.tags and "lora" not in data.tags


def test_licences_that_differ_are_said_not_chosen(base, adapters, texts, tmp_path):
    own = naming(tmp_path, adapters, "org/model", "mit")
    (own["plain"] / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    merged_by(base, own, texts, out := tmp_path / "out")
    assert ModelCard.load(out / "README.md").data.license is None
    warnings = json.loads((out / "report.json").read_text())["warnings"]
    assert any("adapter plain cc-by-nc-4.0, adapter rslora mit" in line for line in warnings)


def test_which_name_a_base_has(tmp_path):
    cache = "/x/hub/models--org--a-b/snapshots/0123"
    assert hub_id(cache) == "org/a-b" and hub_id("org/model") == "org/model"
    assert hub_id(tmp_path) is hub_id("./a/b") is hub_id("model") is hub_id(None) is None
    local = str(tmp_path)
    assert public_base(local, ["org/model", None, "./out", "org/model"]) == "org/model"
    assert public_base(local, ["org/model", "org/other"]) is None and public_base(local, ["tiny"]) is None
    assert public_base(cache, ["org/model"]) == "org/a-b" and public_base("gpt2", []) == "gpt2"
    assert public_base(cache, ["org/model"], "me/mine") == "me/mine"


def test_a_base_id_that_names_nothing_is_refused_before_learning(base, adapters, texts, tmp_path):
    for name in ("/models/llama", "a/b/c", "two words", ""):
        flags = [f"--adapter=plain={adapters['plain']}", "--data=plain=nothing.txt", f"--base-id={name}"]
        ran = CliRunner().invoke(app, ["merge", "--base", str(base), *flags, "--out", str(tmp_path / "out")])
        assert ran.exit_code == 1 and "is no name of the Hub; give USER/NAME" in ran.stderr


def test_texts_keep_their_meaning_without_paths():
    names = PublicNames.of("/m/base", "org/base", ["/home/me/my own/a", "rows given in Python"])
    own = {
        "base": "/m/base",
        "note": "the rows of /home/me/my own/a, and/or 1/2 of /srv/x.json (see https://arxiv.org/abs/1, |D x| / |x|)",
        "parts": [{"at": "/opt/models/llama"}, ("/m/base", 3, None)],
    }
    public = names.apply(own)
    assert public == {
        "base": "org/base",
        "note": "the rows of a, and/or 1/2 of x.json (see https://arxiv.org/abs/1, |D x| / |x|)",
        "parts": [{"at": "llama"}, ("org/base", 3, None)],
    }
    assert overlaid(public, difference(own, public)) == own and difference(public, public) is None


class Hub:
    """What ``push`` asks of huggingface_hub."""

    def __init__(self):
        self.made, self.files = [], []

    def create_repo(self, repository, **options):
        self.made.append((repository, options))

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **_):
        names = (p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file())
        self.files = sorted(name for name in names if name not in ignore_patterns)
        return f"hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(pushing, "HfApi", lambda: hub)
    return hub


def test_a_proven_folder_is_uploaded_without_the_places_of_this_machine(shared, hub, tmp_path):
    out = shutil.copytree(shared, tmp_path / "out")
    card = out / "README.md"
    card.write_text(card.read_text() + "\nA word of the author.")
    ran = CliRunner().invoke(app, ["push", str(out), "me/merge", "--private"])
    assert not ran.exception and "hub/me/merge" in ran.output
    assert hub.made == [("me/merge", {"private": True, "exist_ok": True})]
    assert "local.yaml" not in hub.files and (out / "local.yaml").exists()
    assert {"README.md", "adapter_model.safetensors", "merge.yaml", "proof.json"} <= set(hub.files)


UNPROVEN = {
    "a weight": (
        lambda o: rewrite(o / "adapter_model.safetensors", lambda t: next(iter(t.values())).add_(1)),
        "is not",
    ),
    "a byte of the config": (lambda o: (o / "adapter_config.json").open("a").write(" "), "is not what was proven"),
    "the record": (lambda o: (o / "merge.yaml").write_text("base: other"), r"merge\.yaml is not what was proven"),
    "a lost file": (lambda o: (o / "coefficients.safetensors").unlink(), r"lacks coefficients\.safetensors"),
    "a new file": (lambda o: (o / "adapter_model.bin").write_bytes(b"x"), "was not there when"),
    "a new head": (lambda o: ((o / "heads").mkdir(), (o / "heads/x.safetensors").write_bytes(b"")), "heads/x"),
    "no proof": (lambda o: (o / "proof.json").unlink(), "not known to be proven"),
    "half a proof": (lambda o: (o / "proof.json").write_text('{"files": 3}'), "not known to be proven"),
    "a path in the card": (lambda o: (o / "README.md").open("a").write(str(Path.home() / "x")), "a place of this"),
    "no card": (lambda o: (o / "README.md").unlink(), "no valid model card"),
    "a card without base": (lambda o: (o / "README.md").write_text("---\ntags: [x]\n---\n"), "names no base_model"),
}


@pytest.mark.parametrize("case", UNPROVEN)
def test_nothing_unproven_is_uploaded(shared, hub, tmp_path, case):
    out = shutil.copytree(shared, tmp_path / "out")
    damage, said = UNPROVEN[case]
    damage(out)
    with pytest.raises(NSCError, match=said):
        pushing.push(out, "me/merge")
    assert not hub.made and not hub.files


def test_a_base_without_a_name_is_named_before_it_is_uploaded(base, adapters, texts, hub, tmp_path):
    merged_by(base, naming(tmp_path, adapters, None), texts, tmp_path / "out")
    with pytest.raises(NSCError, match="--base-id USER/NAME"):
        pushing.push(tmp_path / "out", "me/merge")
    nsc.apply(tmp_path / "out").save(tmp_path / "named", base_id="org/model")
    assert pushing.push(tmp_path / "named", "me/merge") == "hub/me/merge"


def test_a_refusal_of_the_hub_is_one_sentence(shared, monkeypatch):
    class Offline(Hub):
        def create_repo(self, *_, **__):
            raise ConnectionError("no route")

    monkeypatch.setattr(pushing, "HfApi", Offline)
    with pytest.raises(NSCError, match=r"the Hub did not take .*: no route; check `hf auth login`"):
        pushing.push(shared, "me/merge")
    with pytest.raises(NSCError, match="is no name of the Hub"):
        pushing.push(shared, "../merge")
