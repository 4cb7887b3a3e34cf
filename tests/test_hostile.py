"""Tables, names and presets from strangers: one line each."""

import pytest
import yaml

from DDNM import main as reconstruct
from DDNM.guided_diffusion.results import read_logits
from utils import InputError, read_yaml

NAMES = ["", ".", "..", "a/b", "a\\b", "n" * 300, "line\nbreak", "bell\a", "y"]  # no file names, or there twice
ROWS = ["x,1,2", "x", "x,1e99", "x,nan", "x,a"]
HEADS = ["", "name,Smiling", "name\nx", "name,name,Smiling\nx,x,1"]


@pytest.mark.parametrize("text, said", [
    *((f'name,Smiling\ny,1\n"{name}",1\n', "line 3: .*(name|expected)") for name in NAMES),
    *((f"name,Smiling\n{row}\n", "line 2: expected a name and 1 finite number") for row in ROWS),
    *((text, "expected the columns name and 1 attribute") for text in HEADS),
    ("name,Smilling\nx,1\n", "unknown 'Smilling', did you mean 'Smiling'"),
])  # fmt: skip
def test_a_table_of_logits_that_cannot_be_used_is_one_line(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=f"t.csv.*{said}"):
        read_logits(tmp_path / "t.csv", ["Smiling"])


@pytest.mark.parametrize("name", ["..", ".", "", "a/../..", "../mine", "{mine}", "link", "link/x", "a/../../mine"])
def test_results_stay_in_their_root(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reconstruct, "SAMPLES", tmp_path / "samples")
    for folder in ("samples", "mine"):
        (tmp_path / folder).mkdir()
    (tmp_path / "samples" / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="must be inside"):
        reconstruct.result_folder(reconstruct.Run(config=tmp_path, image_folder=name.format(mine=tmp_path / "mine")))


CONFIGS = {  # and what is right
    "# nothing yet\n": {},
    "steps: 5\nname: \u00e9\ntyped: [5, {a: 1}]\n": {"steps": "5", "name": "\u00e9", "typed": [5, {"a": 1}]},
    "name: 007": {"name": "007"},
    "- steps\n- 5": "got a list",
    "just words": "got a str",
    "steps: [1": "not readable as YAML",
    "1: 2": "unknown key 1",
    "k" * 1000 + ": 1": "unknown key",
    "steps: !!python/object/apply:os.mkdir [pwned]\n": "could not determine a constructor",
    b"\xff\xfe\x00\x81": "not readable",
    None: "no such file",
}


@pytest.mark.parametrize("content", CONFIGS, ids=range(len(CONFIGS)))
def test_a_preset_is_a_flat_mapping_or_refused_in_one_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path, said = tmp_path / "c.yml", CONFIGS[content]
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(said, dict):
        assert read_yaml(path, ["steps", "name"], ["typed"]) == said
        return
    with pytest.raises(InputError, match=f"config .*c.yml: .*{said}") as error:
        read_yaml(path, ["steps"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("key, value", [
    ("steps", 0), ("steps", 10**9), ("steps", "many"), ("steps", [1]), ("steps", 1.5), ("seed", -1), ("seed", 2**64),
    ("eta", float("nan")), ("eta", 2), ("travel_repeat", 10**9), ("travel_length", 10**9), ("batch_size", 0),
    ("lambda1", float("inf")), ("guidance", "magic"), ("ni", "maybe"), ("path_y", {"a": 1}), ("spnn", "a\0b"),
    ("image_folder", "a\0b"),
])  # fmt: skip
def test_types_and_ranges_of_a_preset_of_the_reconstruction_are_checked(tmp_path, key, value):
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"path_y": "x", key: value}))
    with pytest.raises(InputError, match=key):
        reconstruct.parse(["--config", str(tmp_path / "c.yml")])
