"""Laws over random architectures, and random damage to whatever comes from outside.

Hypothesis draws the examples, the same ones every time (``derandomize``); ``-m slow`` draws many more. What is asked of
damage is always the same: a result, or one clear line (`InputError`, or argparse's own status 2); never a traceback, a
hang or half a file.
"""

import contextlib
import io
import json
import math
import signal
import warnings
from pathlib import Path

import pytest
import torch
from helpers import randomise, seeded, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout import annotation_text
from PIL import Image
from rows import Row
from test_laws import LAWS, LAWS_OF_NETWORKS, Case

import checkpoints
import train_celeba
from checkpoints import read_weights, save_spnn
from data_loader import read_annotations
from DDNM import main as reconstruct
from DDNM.guided_diffusion import inputs
from DDNM.guided_diffusion.results import read_logits, write_logits
from images import load_image
from loop import load_state, save_state
from models import SPNN
from utils import InputError, InputErrors


def sizes(few: int, many: int):
    """A short run in the suite, a long one with ``-m slow``."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def examples_of(count: int) -> settings:
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


# --- Random architectures --------------------------------------------------------------------------------------------


@st.composite
def architectures(draw):
    """Keywords of a valid SPNN: unshuffles whose factors multiply to the image size, and blocks in between."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3).filter(lambda f: 1 < math.prod(f) <= 8))
    img_ch, img_size = draw(st.integers(1, 3)), math.prod(factors)
    channels, size, layers = img_ch, img_size, []
    mixings = st.sampled_from(["cayley", "householder"])
    for i, factor in enumerate(factors):
        layers.append(("PixelUnshuffleBlock", {"r": factor}))
        channels, size = channels * factor**2, size // factor
        last = i == len(factors) - 1
        if channels > 1 and (last or channels > 16 or draw(st.booleans())):
            block = {
                "in_ch": channels,
                "out_ch": draw(st.integers(1, min(12, channels - 1))),
                "hidden": draw(st.integers(1, 8)),
                "feat_size": draw(st.sampled_from([None] + [size] * (size == 1 or size % 2 == 0))),
                "scale_bound": draw(st.sampled_from([0.25, 1.0, 2.0])),
            }
            layers.append(("ConvPINNBlock", block | draw(st.sampled_from([{}, {"mix_type": draw(mixings)}]))))
            channels = block["out_ch"]
    return {"img_ch": img_ch, "num_classes": channels, "img_size": img_size, "mix_type": draw(mixings),
            "layer_channels": layers}  # fmt: skip


# Relative errors of float32, near usual outputs and 50 times as far out, as in test_laws.CHAIN for chains of the same
# depth. Smaller channels make worse conditioned weights likelier, so near is ten times as wide.
FLOAT32 = 1e-3, 2e-2


@sizes(8, 200)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_random_architectures_hold_every_law(examples, dtype):
    seen = []

    @examples_of(examples)
    @given(architectures(), st.integers(0, 10**6))
    def check(architecture, seed):
        model = randomise(SPNN(**architecture).to(dtype), seeded(seed)).eval()
        shape = model.pinn.in_shape
        bounds = (1e-10, 1e-9) if dtype == torch.float64 else FLOAT32
        with torch.no_grad():
            case = Case(Row("", SPNN, shape, any(block.lossy for block in model.pinn.blocks)), dtype, model)
            case.rtol, case.far = bounds
            for law in [*LAWS, *LAWS_OF_NETWORKS]:
                law(case)
        seen.append(architecture)

    check()
    kinds = {a["mix_type"] for a in seen}, {n for a in seen for n, _ in a["layer_channels"]}
    assert len(seen) >= examples and kinds == ({"cayley", "householder"}, {"PixelUnshuffleBlock", "ConvPINNBlock"})


WRONG = {  # of a block
    "in_ch": ["4", None],
    "out_ch": [0, -2, "1", None, 0.5],
    "feat_size": [3, 5, 64, 0, -2, "2", 1.5],
    "mix_type": ["", "Cayley", 3, None],
    "hidden": [0, -1, 1.5, "3", None, math.nan],
    "scale_bound": [0, -1, "3", None, [], math.nan, math.inf],
    "unknown": [0, None],
}
CHAINS = [
    [], "text", 5, [5], [("Nothing", {})], [("ConvPINNBlock", 3)], [(3, {})], [("PixelUnshuffleBlock", {"r": 0})],
    [("PixelUnshuffleBlock", {"r": "2"})], [("PixelUnshuffleBlock", {"r": 7})],
]  # fmt: skip


@st.composite
def misfits(draw):
    """A valid architecture with one thing made wrong."""
    architecture = draw(architectures())
    layers = architecture["layer_channels"]
    blocks = [i for i, (name, _) in enumerate(layers) if name == "ConvPINNBlock"]
    kind = draw(st.sampled_from(["block", "chain", "network"]))
    if kind == "block" and blocks:
        index, key = draw(st.sampled_from(blocks)), draw(st.sampled_from(list(WRONG)))
        name, arguments = layers[index]
        ins, outs = arguments["in_ch"], arguments["out_ch"]
        value = draw(st.sampled_from(WRONG[key] + {"in_ch": [ins + 1, outs], "out_ch": [ins, ins + 1]}.get(key, [])))
        layers[index] = (name, {**arguments, key: value})
    elif kind == "network":
        key = draw(st.sampled_from(["img_ch", "num_classes", "img_size"]))
        larger = [] if key == "img_size" else [architecture[key] + 1]  # a larger image may end at a map, and fit
        architecture[key] = draw(st.sampled_from([*larger, 0, -3, "3", None, 2.5, math.nan]))
    else:
        longer = [layers[:-1] * 2, [*layers, ("PixelUnshuffleBlock", {"r": 2})]]
        architecture["layer_channels"] = draw(st.sampled_from(CHAINS + longer))
    return architecture


@st.composite
def nonsense(draw):
    """A built-in architecture, of which one thing is wrong."""
    key = draw(st.sampled_from(["img_ch", "num_classes", "hidden", "scale_bound", "img_size", "mix_type"]))
    wrong = [0, -1, "3", None, math.nan, math.inf] + [1.5, True] * (key != "scale_bound")
    return {"img_size": 32, "num_classes": 5, "hidden": 8, key: draw(st.sampled_from(wrong))}


@sizes(60, 1500)
@pytest.mark.parametrize("kind", [misfits, nonsense])
def test_what_does_not_fit_is_refused_when_built(examples, kind):
    @examples_of(examples)
    @given(kind())
    def check(architecture):
        with torch.device("meta"), pytest.raises(ValueError) as error:
            SPNN(**architecture)
        assert str(error.value)

    check()


# --- Random damage ---------------------------------------------------------------------------------------------------

TOKENS = [b"", b"\0", b"\xff", b"\n", b"-1", b"1e999", b"nan", b"999999999999999999999", b"../", b"[", b"{", b"&a",
          b"*a", b": ", b'"', b"\xef\xbb\xbf", b"\r\n", b"\xc2\x85", b"\xe2\x80\xa8", b"!!python/name:os.system ",
          b"9" * 5000]  # fmt: skip


@st.composite
def damage(draw):
    """A function that damages bytes: bits turned, parts cut, doubled, moved or put in."""
    share = st.floats(0, 1)
    step = st.tuples(st.integers(0, 5), share, share, st.sampled_from(TOKENS), st.integers(0, 7))
    steps = draw(st.lists(step, min_size=1, max_size=4))

    def apply(content: bytes) -> bytes:
        for kind, where, to, token, bit in steps:
            i, j = sorted((int(where * len(content)), int(to * len(content))))
            turned = bytes([content[i] ^ 1 << bit]) if i < len(content) else b""
            content = [
                content[:i] + turned + content[i + 1 :],
                content[:i],
                content[:i] + content[min(j, i + 40) :],
                content[:i] + token + content[i:],
                content[:j] + content[i : i + 60] + content[j:],
                content[:i] + token + content[i + len(token) :],
            ][kind]
        return content

    return apply


class Hang(BaseException):
    pass


@contextlib.contextmanager
def survives(seconds: int = 20):
    """A result, an InputError of one line, or argparse's own refusal; anything else passes through and fails."""

    def too_long(*_):
        raise Hang(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 2000, str(error)[:3000]
    except SystemExit as stop:
        # one message, which may quote a word that holds line breaks itself
        assert stop.code == 2 and errors.getvalue().count(": error: ") == 1, errors.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def network(folder: Path, name: str, broken: str | None = None):
    save_spnn(folder / name, randomise(tiny(hidden=1), seeded(0)), {"attributes": ["a", "b", "c"]})

    def use(path):
        assert all(p.isfinite().all() for p in SPNN.from_pretrained(folder / name).parameters())

    return folder / (broken or name), use


def converted(folder: Path, suffix: str):
    path, target = network(folder, f"m{suffix}")[0], folder / "out" / "t.safetensors"

    def use(path):
        target.unlink(missing_ok=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                checkpoints.main(["convert", str(path), str(target)])
            read_weights(target)
        finally:
            left = [file.name for file in target.parent.iterdir()] if target.parent.exists() else []
            assert left in ([], ["t.safetensors"])  # whole or not at all

    return path, use


def training_state(folder: Path):
    model = tiny(hidden=1)
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": {"done": 3, "rows": []}}
    save_state(folder / "state.pth", {"settings": {"lr": 1e-3}, **state})
    return folder / "state.pth", load_state


def annotations(folder: Path):
    def use(path):
        found = read_annotations(path)
        assert found.labels.shape == (len(found.files), 40) and set(found.labels.flat) <= {0, 1}

    (folder / "a.txt").write_text(annotation_text(6))
    return folder / "a.txt", use


def logits(folder: Path):
    def use(path):
        names, values = read_logits(path, ["a", "b"])
        assert values.shape == (len(names), 2) and values.isfinite().all() and len(set(names)) == len(names)
        assert all(Path(name).name == name for name in names)

    write_logits(folder / "t.csv", ["one", "two"], ["a", "b"], torch.tensor([[1.0, -2.5], [0.125, 4.0]]))
    return folder / "t.csv", use


def image(folder: Path, suffix: str):
    def use(path):
        x = load_image(path, 8)
        assert x.shape == (3, 8, 8) and x.abs().max() <= 1

    Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 30).convert("RGB").save(folder / f"a.{suffix}")
    return folder / f"a.{suffix}", use


def preset(folder: Path, parse, file: Path, *others: str):
    (folder / "c.yml").write_bytes(file.read_bytes())
    # what a run would write into its folder
    return folder / "c.yml", lambda path: json.dumps(vars(parse(["--config", str(path), *others])[0]), default=str)


def line(folder: Path, parse, words: str):
    def use(path):
        given = path.read_bytes().decode(errors="surrogateescape").replace("\0", "").split(" ")
        json.dumps(vars(parse([word for word in given if word not in ("-h", "--help")])[0]), default=str)

    (folder / "line").write_text(words)
    return folder / "line", use


DAMAGED = {  # of a folder, a file in it and what is done with that
    "m.pth": lambda f: network(f, "m.pth"),
    "m.safetensors": lambda f: network(f, "m.safetensors"),
    "config.json": lambda f: network(f, "m.pth", "config.json"),
    "converted pth": lambda f: converted(f, ".pth"),
    "converted safetensors": lambda f: converted(f, ".safetensors"),
    "state": training_state,
    "annotations": annotations,
    "logits": logits,
    **{suffix: lambda f, suffix=suffix: image(f, suffix) for suffix in ("png", "jpg", "tiff")},
    "sampling preset": lambda f: preset(f, reconstruct.parse, inputs.CONFIGS / "celeba_hq.yml", "--path_y", "x"),
    "training preset": lambda f: preset(
        f, train_celeba.read_command, checkpoints.ROOT / "configs" / "faces_64.yml", "--is_r_opt"
    ),
    "sampling line": lambda f: line(f, reconstruct.parse, "--ni --config faces.yml --path_y faces --set Smiling=1 "
                                    "--steps 20 --eta 0.5 --seed 7 --no-clip_x0"),
    "training line": lambda f: line(f, train_celeba.read_command, "--dataset_path data --is_forward_train --lr 1e-3 "
                                    "--img_size 64 --epoch 2 --batch_size 8 --mix_type cayley --checkpoint_dir out"),
}  # fmt: skip


@sizes(16, 300)
@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_read_or_refused_in_one_line(tmp_path, name, examples):
    path, use = DAMAGED[name](tmp_path)
    content, refused = path.read_bytes(), 0
    use(path)  # whole

    @examples_of(examples)
    @given(damage())
    def check(harm):
        nonlocal refused
        path.write_bytes(harm(content))
        refused += 1
        with survives():
            use(path)
            refused -= 1

    check()
    assert refused


def test_this_file_notices_a_traceback_a_hang_and_a_long_message():
    for problem in (KeyError("x"), RecursionError(), InputErrors("two\nlines"), InputError(""), SystemExit(1)):
        with pytest.raises((type(problem), AssertionError)):
            with survives():
                raise problem
    with pytest.raises(Hang):
        with survives(seconds=1):
            while True:
                pass
