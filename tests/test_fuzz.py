"""Laws over random architectures, and random damage to whatever comes from outside.

Hypothesis draws the examples, the same ones every time (``derandomize``); ``-m slow`` draws many more. What is asked of
damage is always the same: a result, or one clear line (`InputError`, or argparse's own status 2); never a traceback, a
hang or half a file.
"""

import contextlib
import io
import json
import signal
import warnings
from pathlib import Path

import pytest
import torch
from helpers import randomise, seeded, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout import annotation_text
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
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3).filter(lambda f: 1 < _product(f) <= 8))
    channels, size, layers = draw(st.integers(1, 3)), _product(factors), []
    img_ch, img_size = channels, size
    mixings = st.sampled_from(["cayley", "householder"])

    def block(most: int) -> None:
        nonlocal channels
        out = draw(st.integers(1, min(most, channels - 1)))
        fitting = [None] + [size] * (size == 1 or size % 2 == 0)
        arguments = {"in_ch": channels, "out_ch": out, "hidden": draw(st.integers(1, 8))}
        arguments["feat_size"] = draw(st.sampled_from(fitting))
        arguments["scale_bound"] = draw(st.sampled_from([0.25, 1.0, 2.0]))
        if draw(st.booleans()):
            arguments["mix_type"] = draw(mixings)
        layers.append(("ConvPINNBlock", arguments))
        channels = out

    for factor in factors:
        layers.append(("PixelUnshuffleBlock", {"r": factor}))
        channels, size = channels * factor**2, size // factor
        if channels > 1 and (channels > 16 or draw(st.booleans())):
            block(most=12)
    if channels > 1 and (channels > 12 or not any("in_ch" in a for _, a in layers)):
        block(most=8)
    return {
        "img_ch": img_ch,
        "num_classes": channels,
        "img_size": img_size,
        "mix_type": draw(mixings),
        "layer_channels": layers,
    }


def _product(numbers) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


# Relative errors of float32, near usual outputs and 50 times as far out, as in test_laws.CHAIN for chains of the same
# depth. Smaller channels make worse conditioned weights likelier, so near is ten times as wide.
FLOAT32 = {"rtol": 1e-3, "far": 2e-2}


@sizes(12, 200)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_random_architectures_hold_every_law(examples, dtype):
    seen = []

    @examples_of(examples)
    @given(architectures(), st.integers(0, 10**6))
    def check(architecture, seed):
        model = randomise(SPNN(**architecture).to(dtype), seeded(seed)).eval()
        shape = model.pinn.in_shape
        bounds = {"rtol": 1e-10, "far": 1e-9} if dtype == torch.float64 else FLOAT32
        with torch.no_grad():
            case = Case(model, shape, dtype, **bounds, lossy=any(block.lossy for block in model.pinn.blocks))
            for law in [*LAWS, *LAWS_OF_NETWORKS]:
                law(case)
        seen.append(architecture)

    check()
    kinds = {a["mix_type"] for a in seen}, {n for a in seen for n, _ in a["layer_channels"]}
    assert len(seen) >= examples and kinds == ({"cayley", "householder"}, {"PixelUnshuffleBlock", "ConvPINNBlock"})


NONSENSE = st.sampled_from([0, -1, 1.5, "3", None, [], float("nan"), float("inf"), True, {}])


@st.composite
def misfits(draw):
    """A valid architecture with one thing made wrong."""
    architecture = draw(architectures())
    layers = architecture["layer_channels"]
    blocks = [i for i, (name, _) in enumerate(layers) if name == "ConvPINNBlock"]
    index = draw(st.sampled_from(blocks)) if blocks else 0
    name, arguments = layers[index]
    kind = draw(st.sampled_from(["block", "chain", "network"]))
    if kind == "block" and blocks:
        key = draw(st.sampled_from(["in_ch", "out_ch", "hidden", "scale_bound", "feat_size", "mix_type", "unknown"]))
        if key == "out_ch":
            value = draw(st.sampled_from([arguments["in_ch"], arguments["in_ch"] + 1, 0, -2, "1", None, 0.5]))
        elif key == "in_ch":
            value = draw(st.sampled_from([arguments["in_ch"] + 1, arguments["out_ch"], "4", None]))
        elif key == "feat_size":
            value = draw(st.sampled_from([3, 5, 64, 0, -2, "2", 1.5]))
        elif key == "mix_type":
            value = draw(st.sampled_from(["", "Cayley", 3, None, []]))
        elif key == "hidden":
            value = draw(st.sampled_from([0, -1, 1.5, "3", None, float("nan")]))
        else:
            value = draw(st.sampled_from([0, -1, "3", None, [], float("nan"), float("inf")]))
        layers[index] = (name, {**arguments, key: value})
    elif kind == "chain":
        architecture["layer_channels"] = draw(
            st.sampled_from([[], "text", 5, [5], [("Nothing", {})], [("ConvPINNBlock", 3)], [(3, {})], layers[:-1] * 2,
                             [*layers, ("PixelUnshuffleBlock", {"r": 2})], [("PixelUnshuffleBlock", {"r": 0})],
                             [("PixelUnshuffleBlock", {"r": "2"})], [("PixelUnshuffleBlock", {"r": 7})]])
        )  # fmt: skip
    elif kind == "network":
        key = draw(st.sampled_from(["img_ch", "num_classes", "img_size"]))
        larger = [] if key == "img_size" else [architecture[key] + 1]  # a larger image may end at a map, and fit
        architecture[key] = draw(st.sampled_from([*larger, 0, -3, "3", None, 2.5, float("nan")]))
    return architecture


@sizes(150, 1500)
def test_random_misfits_are_refused_when_built(examples):
    @examples_of(examples)
    @given(misfits())
    def check(architecture):
        with pytest.raises(ValueError) as error:
            SPNN(**architecture)
        assert str(error.value)

    check()


@sizes(40, 400)
def test_nonsense_for_a_built_in_architecture_is_refused_when_built(examples):
    @examples_of(examples)
    @given(st.sampled_from(["img_ch", "num_classes", "hidden", "scale_bound", "img_size", "mix_type"]), NONSENSE)
    def check(key, value):
        if (key, value) in (("scale_bound", 1.5), ("scale_bound", True)):
            return
        with torch.device("meta"), pytest.raises(ValueError, match=f"{key}|Block|block|built-in"):
            SPNN(**{"img_size": 32, "num_classes": 5, "hidden": 8, key: value})

    check()


# --- Random damage ---------------------------------------------------------------------------------------------------

TOKENS = [b"", b"\0", b"\xff", b"\n", b"-1", b"1e999", b"nan", b"999999999999999999999", b"../", b"[", b"{", b"&a",
          b"*a", b": ", b'"', b"\xef\xbb\xbf", b"\r\n", b"\xc2\x85", b"\xe2\x80\xa8", b"!!python/name:os.system ",
          b"9" * 5000]  # fmt: skip


@st.composite
def damage(draw):
    """A function that damages bytes: bits turned, parts cut, doubled, moved or put in."""
    steps = draw(
        st.lists(
            st.tuples(st.integers(0, 5), st.floats(0, 1), st.floats(0, 1), st.sampled_from(TOKENS), st.integers(0, 7)),
            min_size=1,
            max_size=4,
        )
    )

    def apply(content: bytes) -> bytes:
        for kind, where, to, token, bit in steps:
            i, j = sorted((int(where * len(content)), int(to * len(content))))
            if kind == 0 and i < len(content):
                content = content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :]
            elif kind == 1:
                content = content[:i]
            elif kind == 2:
                content = content[:i] + content[min(j, i + 40) :]
            elif kind == 3:
                content = content[:i] + token + content[i:]
            elif kind == 4:
                content = content[:j] + content[i : i + 60] + content[j:]
            else:
                content = content[:i] + token + content[i + len(token) :]
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    notes = {"attributes": ["a", "b", "c"], "typical_logits": [[-1.0, 1.0]] * 3}
    for suffix in (".pth", ".safetensors"):
        save_spnn(folder / f"m{suffix}", randomise(tiny(hidden=1), seeded(0)), notes)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@sizes(30, 300)
@pytest.mark.parametrize("broken", ["m.pth", "m.safetensors", "config.json"])
def test_damaged_checkpoints(tmp_path, checkpoint, broken, examples):
    name = "m.pth" if broken == "config.json" else broken
    for file, content in checkpoint.items():
        (tmp_path / file).write_bytes(content)
    outcomes = set()

    @examples_of(examples)
    @given(damage())
    def check(harm):
        (tmp_path / broken).write_bytes(harm(checkpoint[broken]))
        outcomes.add("refused")
        with survives():
            model = SPNN.from_pretrained(tmp_path / name)
            assert all(p.isfinite().all() for p in model.parameters())
            outcomes.add("read")

    check()
    assert outcomes == {"read", "refused"}, "both should come up"


@sizes(20, 300)
def test_damaged_weights_are_converted_whole_or_not_at_all(tmp_path, checkpoint, examples):
    @examples_of(examples)
    @given(damage(), st.sampled_from([".pth", ".safetensors"]))
    def check(harm, suffix):
        source, target = tmp_path / f"s{suffix}", tmp_path / "out" / "t.safetensors"
        source.write_bytes(harm(checkpoint[f"m{suffix}"]))
        target.unlink(missing_ok=True)
        with survives(), contextlib.redirect_stdout(io.StringIO()):
            checkpoints.main(["convert", str(source), str(target)])
        left = [path.name for path in target.parent.iterdir()] if target.parent.exists() else []
        assert left in ([], ["t.safetensors"])
        if left:
            read_weights(target)

    check()


@sizes(30, 300)
def test_damaged_training_states(tmp_path, examples):
    model = tiny(hidden=1)
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": {"done": 3, "rows": []}}
    path = tmp_path / "state.pth"
    save_state(path, {"settings": {"lr": 1e-3}, **state})
    content, outcomes = path.read_bytes(), set()

    @examples_of(examples)
    @given(damage())
    def check(harm):
        path.write_bytes(harm(content))
        outcomes.add("refused")
        with survives():
            load_state(path)
            outcomes.add("read")

    check()
    assert outcomes == {"read", "refused"}, "both should come up"


@sizes(30, 300)
def test_damaged_annotations(tmp_path, examples):
    content = annotation_text(6).encode()

    @examples_of(examples)
    @given(damage())
    def check(harm):
        (tmp_path / "a.txt").write_bytes(harm(content))
        with survives():
            found = read_annotations(tmp_path / "a.txt")
            assert found.labels.shape == (len(found.files), 40) and set(found.labels.flat) <= {0, 1}
            assert all(Path(file).name == file for file in found.files)

    check()


@sizes(15, 150)
def test_damaged_tables_of_logits(tmp_path, examples):
    write_logits(tmp_path / "t.csv", ["one", "two"], ["a", "b"], torch.tensor([[1.0, -2.5], [0.125, 4.0]]))
    content = (tmp_path / "t.csv").read_bytes()

    @examples_of(examples)
    @given(damage())
    def check(harm):
        (tmp_path / "t.csv").write_bytes(harm(content))
        with survives():
            names, logits = read_logits(tmp_path / "t.csv", ["a", "b"])
            assert logits.shape == (len(names), 2) and logits.isfinite().all() and len(set(names)) == len(names)
            assert all(Path(name).name == name for name in names)

    check()


@sizes(20, 200)
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_damaged_pictures(tmp_path, suffix, examples):
    from PIL import Image

    path = tmp_path / f"a.{suffix}"
    Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 30).convert("RGB").save(path)
    content = path.read_bytes()

    @examples_of(examples)
    @given(damage())
    def check(harm):
        path.write_bytes(harm(content))
        with survives():
            image = load_image(path, 8)
            assert image.shape == (3, 8, 8) and image.abs().max() <= 1

    check()


PRESETS = {
    "sampling": (reconstruct.parse, inputs.CONFIGS / "celeba_hq.yml", ["--path_y", "x"]),
    "training": (train_celeba.read_command, reconstruct.ROOT / "configs" / "faces_64.yml", ["--is_r_opt"]),
}


@sizes(25, 300)
@pytest.mark.parametrize("preset", PRESETS)
def test_damaged_configs(tmp_path, preset, examples):
    parse, file, others = PRESETS[preset]
    content = file.read_bytes()

    @examples_of(examples)
    @given(damage())
    def check(harm):
        (tmp_path / "c.yml").write_bytes(harm(content))
        with survives():
            args = parse(["--config", str(tmp_path / "c.yml"), *others])[0]
            json.dumps(vars(args), default=str)  # what a run would write into its folder

    check()


LINES = {
    "sampling": (reconstruct.parse, ["--ni", "--config", "faces.yml", "--path_y", "faces", "--image_folder",
                 "out", "--set", "Smiling=1", "--steps", "20", "--eta", "0.5", "--seed", "7", "--no-clip_x0"]),
    "training": (train_celeba.read_command, ["--dataset_path", "data", "--is_forward_train", "--img_size", "64", "--lr",
                 "1e-3", "--epoch", "2", "--batch_size", "8", "--mix_type", "cayley", "--checkpoint_dir", "out"]),
}  # fmt: skip


@sizes(30, 300)
@pytest.mark.parametrize("command", LINES)
def test_damaged_command_lines(command, examples):
    parse, words = LINES[command]

    @examples_of(examples)
    @given(damage(), st.permutations(range(len(words))), st.integers(0, 3))
    def check(harm, order, swaps):
        line = list(words)
        for i, j in zip(order[:swaps], order[::-1], strict=False):
            line[i], line[j] = line[j], line[i]
        text = harm("\x1f".join(line).encode()).decode(errors="surrogateescape").replace("\0", "")
        with survives():
            words_left = [word for word in text.split("\x1f") if word not in ("-h", "--help")]
            json.dumps(vars(parse(words_left)[0]), default=str)

    check()


def test_this_file_notices_a_traceback_a_hang_and_a_long_message():
    for problem in (KeyError("x"), RecursionError(), InputErrors("two\nlines"), InputError(""), SystemExit(1)):
        with pytest.raises((type(problem), AssertionError)):
            with survives():
                raise problem
    with pytest.raises(Hang):
        with survives(seconds=1):
            while True:
                pass
