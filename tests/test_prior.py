"""Priors: the published DDPM layout against its equations written out, and every way in and out of a file."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel

from checkpoints import read_weights, write_weights
from DDNM.guided_diffusion.prior import Prior, load_prior, prior_from_ddpm, save_prior, small_unet
from DDNM.guided_diffusion.schedule import Schedule
from utils import InputError

TINY = {
    "type": "simple", "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "in_channels": 3,
    "out_ch": 3, "dropout": 0.0, "resamp_with_conv": True,
}  # fmt: skip
CELEBA_HQ = {**TINY, "ch": 128, "ch_mult": [1, 1, 2, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [16]}
SIZE = 8


def ddpm_shapes(config, size):
    """Names and shapes of the published layout, from its construction."""
    shapes, ch, n = {}, config["ch"], config["num_res_blocks"]
    widths = [ch * m for m in config["ch_mult"]]

    def layer(name, out, into, k=None):
        shapes[f"{name}.weight"] = [out, into] if k is None else [out, into, k, k]
        shapes[f"{name}.bias"] = [out]

    def norm(name, c):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [c], [c]

    def block(name, into, out):
        norm(f"{name}.norm1", into)
        layer(f"{name}.conv1", out, into, 3)
        layer(f"{name}.temb_proj", out, 4 * ch)
        norm(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3)
        if into != out:
            layer(f"{name}.nin_shortcut", out, into, 1)

    def attention(name, c):
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", c, c, 1)

    layer("temb.dense.0", 4 * ch, ch)
    layer("temb.dense.1", 4 * ch, 4 * ch)
    layer("conv_in", ch, config["in_channels"], 3)
    skips, width = [ch], ch
    for i, out in enumerate(widths):
        for j in range(n):
            block(f"down.{i}.block.{j}", width, out)
            width = out
            skips.append(width)
            if size >> i in config["attn_resolutions"]:
                attention(f"down.{i}.attn.{j}", width)
        if i < len(widths) - 1:
            layer(f"down.{i}.downsample.conv", width, width, 3)
            skips.append(width)
    block("mid.block_1", width, width)
    attention("mid.attn_1", width)
    block("mid.block_2", width, width)
    for i, out in reversed(list(enumerate(widths))):
        for j in range(n + 1):
            block(f"up.{i}.block.{j}", width + skips.pop(), out)
            width = out
            if size >> i in config["attn_resolutions"]:
                attention(f"up.{i}.attn.{j}", width)
        if i > 0:
            layer(f"up.{i}.upsample.conv", width, width, 3)
    norm("norm_out", width)
    layer("conv_out", config["out_ch"], width, 3)
    return shapes


def random_weights(shapes):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        weights[name] = values * scale + ("norm" in name and name.endswith("weight"))
    return weights


def ddpm_forward(w, config, x, t):
    """The published network written out as equations; x (B, 3, H, W), t (B,)."""

    def conv(name, h, **options):
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def norm(name, h):
        return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def dense(name, h):
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def block(name, h):
        out = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)), padding=1)
        out = out + dense(f"{name}.temb_proj", F.silu(temb))[:, :, None, None]
        out = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", out)), padding=1)
        return out + (conv(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.weight" in w else h)

    def attention(name, h):
        if f"{name}.q.weight" not in w:
            return h
        normed = norm(f"{name}.norm", h)
        q, k, v = (conv(f"{name}.{part}", normed).flatten(2) for part in "qkv")  # (B, C, H W)
        mixing = (q.mT @ k * q.shape[1] ** -0.5).softmax(-1)  # (B, H W, H W)
        return h + conv(f"{name}.proj_out", (v @ mixing.mT).unflatten(2, h.shape[2:]))

    half = config["ch"] // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
    angles = t[:, None].float() * frequencies
    temb = dense("temb.dense.1", F.silu(dense("temb.dense.0", torch.cat([angles.sin(), angles.cos()], 1))))
    levels, n = len(config["ch_mult"]), config["num_res_blocks"]
    h = conv("conv_in", x, padding=1)
    skips = [h]
    for i in range(levels):
        for j in range(n):
            h = attention(f"down.{i}.attn.{j}", block(f"down.{i}.block.{j}", h))
            skips.append(h)
        if i < levels - 1:
            h = conv(f"down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
            skips.append(h)
    h = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", h)))
    for i in reversed(range(levels)):
        for j in range(n + 1):
            h = attention(f"up.{i}.attn.{j}", block(f"up.{i}.block.{j}", torch.cat([h, skips.pop()], 1)))
        if i > 0:
            h = conv(f"up.{i}.upsample.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"), padding=1)
    return conv("conv_out", F.silu(norm("norm_out", h)), padding=1)


@pytest.fixture
def tiny():
    return random_weights(ddpm_shapes(TINY, SIZE))


def noisy(batch=2, size=SIZE):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attends", [[4], [8, 4], []])
@torch.no_grad()
def test_published_weights_compute_the_published_equations(attends):
    config = {**TINY, "attn_resolutions": attends}
    weights = random_weights(ddpm_shapes(config, SIZE))
    x, t = noisy(), torch.tensor([3, 731])
    out = prior_from_ddpm(weights, config, SIZE)(x, t)
    torch.testing.assert_close(out, ddpm_forward(weights, config, x, t), rtol=1e-4, atol=1e-4)


def test_the_full_published_layout_is_read():
    shapes = ddpm_shapes(CELEBA_HQ, 256)
    assert len(shapes) == 450 and sum(math.prod(s) for s in shapes.values()) == 113_673_219
    with torch.device("meta"):  # without the memory
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    prior = prior_from_ddpm(weights, CELEBA_HQ, 256)
    assert sum(p.numel() for p in prior.parameters()) == 113_673_219
    assert not any(p.requires_grad for p in prior.parameters()) and not prior.training


def test_every_tensor_must_be_used_and_fit(tiny):
    lacking = {k: v for k, v in tiny.items() if k != "mid.attn_1.q.bias"}
    with pytest.raises(InputError, match="missing mid.attn_1.q.bias"):
        prior_from_ddpm(lacking, TINY, SIZE)
    with pytest.raises(InputError, match="unexpected foreign"):
        prior_from_ddpm({**tiny, "foreign": torch.ones(1)}, TINY, SIZE)
    with pytest.raises(InputError, match=r"up.0.block.0.conv1.weight has shape \[1, 2\]"):
        prior_from_ddpm({**tiny, "up.0.block.0.conv1.weight": torch.ones(1, 2)}, TINY, SIZE)
    with pytest.raises(InputError, match="unexpected down.1.attn"):
        prior_from_ddpm(tiny, {**TINY, "attn_resolutions": []}, SIZE)
    with pytest.raises(InputError, match="lacks ch_mult"):
        prior_from_ddpm(tiny, {k: v for k, v in TINY.items() if k != "ch_mult"}, SIZE)
    with pytest.raises(InputError, match="resamp_with_conv"):
        prior_from_ddpm(tiny, {**TINY, "resamp_with_conv": False}, SIZE)
    with pytest.raises(InputError, match="divisible by 2"):
        prior_from_ddpm(tiny, TINY, 7)


def small(size=16, **options):
    torch.manual_seed(0)
    return small_unet(size, **{"channels": (8, 16), "norm_groups": 4, "attention_size": 4, **options})


@torch.no_grad()
def test_an_unshuffled_prior_is_its_unet_between_two_rearrangements():
    prior = Prior(small())
    x, t = noisy(size=16), torch.tensor([5, 900])
    assert prior.image_size == 16 and prior.unshuffle == 2 and prior.unet.config.in_channels == 12
    by_hand = x.unflatten(2, (8, 2)).unflatten(4, (8, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    expected = prior.unet(by_hand, t).sample
    expected = expected.unflatten(1, (3, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    assert torch.equal(prior(x, t), expected)


@torch.no_grad()
def test_steps_may_be_numbers_and_the_dtype_is_the_inputs():
    prior = Prior(small(unshuffle=1))
    x = noisy(size=16)
    out = prior(x, torch.tensor([7, 7]))
    for t in (7, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        torch.testing.assert_close(prior(x, t), out)
    assert prior(x.double(), 7).dtype == torch.float64
    with pytest.raises(ValueError, match="t must be"):
        prior(x, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 16, 8), (2, 1, 16, 16), (3, 16, 16)])
def test_another_image_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\)"):
        Prior(small())(torch.zeros(shape), 0)


@torch.no_grad()
def test_channels_last_and_autocast_change_only_the_rounding():
    x, t = noisy(size=16), torch.tensor([5, 900])
    plain = Prior(small())(x, t)
    torch.testing.assert_close(Prior(small(), channels_last=True)(x, t), plain, rtol=1e-4, atol=1e-5)
    rounded = Prior(small(), autocast=torch.bfloat16)(x, t)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded, plain, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_the_noise_is_the_first_half_where_variance_is_predicted_too():
    torch.manual_seed(0)
    unet = UNet2DModel(8, 3, 6, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)  # fmt: skip
    x = noisy()
    assert torch.equal(Prior(unet)(x, 3), unet(x, 3).sample[:, :3])


@pytest.mark.parametrize("channels", [(4, 4), (3, 4)])
def test_other_channel_counts_are_no_prior(channels):
    unet = UNet2DModel(8, *channels, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)  # fmt: skip
    with pytest.raises(ValueError, match="3 k\\^2"):
        Prior(unet)


def test_small_unets_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        small(size=10)
    with pytest.raises(ValueError, match="multiples of norm_groups"):
        small(channels=(8, 10))


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.float16, 2e-2)])
@torch.no_grad()
def test_a_saved_prior_is_loaded_in_float32(tmp_path, dtype, tolerance):
    prior = Prior(small())
    save_prior(prior, tmp_path / "prior", dtype)
    loaded = load_prior(tmp_path / "prior", image_size=16)
    x = noisy(size=16)
    torch.testing.assert_close(loaded(x, 500), prior(x, 500), rtol=tolerance, atol=tolerance)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    stored = read_weights(tmp_path / "prior" / "diffusion_pytorch_model.safetensors")
    assert all(v.dtype == (dtype or torch.float32) for v in stored.values())


@torch.no_grad()
def test_folders_with_the_old_attention_names_are_read(tmp_path):
    """google/ddpm-ema-celebahq-256 was published before diffusers renamed them."""
    prior = Prior(small())
    save_prior(prior, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    state = read_weights(file)
    for new, name in old:
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    write_weights(file, state)
    x = noisy(size=16)
    torch.testing.assert_close(load_prior(tmp_path)(x, 500), prior(x, 500), rtol=1e-5, atol=1e-5)


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    save_prior(Prior(small()), tmp_path)
    with pytest.raises(InputError, match="16x16 images, not 64"):
        load_prior(tmp_path, image_size=64)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = read_weights(file)
    state["foreign.weight"] = state.pop("conv_in.weight")
    write_weights(file, state)
    with pytest.raises(InputError, match="keys: (conv_in|foreign).weight"):
        load_prior(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_prior(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="cannot be loaded.*needs config.json"):
        load_prior(tmp_path)


def test_a_weight_file_needs_its_configuration(tmp_path, tiny):
    path = tmp_path / "celeba.ckpt"
    write_weights(path, tiny)
    with torch.no_grad():
        out = load_prior(path, TINY, SIZE)(noisy(), 10)
        torch.testing.assert_close(out, prior_from_ddpm(tiny, TINY, SIZE)(noisy(), 10))
    with pytest.raises(InputError, match="needs a model configuration"):
        load_prior(path)
    with pytest.raises(InputError, match="celeba.ckpt.*unexpected"):
        load_prior(path, {**TINY, "attn_resolutions": []}, SIZE)


def test_hub_ids_that_cannot_be_had_are_one_clear_line(monkeypatch, tmp_path):
    def offline(*args, **options):
        assert options["use_safetensors"] is True
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(UNet2DModel, "from_pretrained", offline)
    with pytest.raises(InputError, match="someone/prior: cannot be loaded.*no route to host") as caught:
        load_prior("someone/prior")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not a hub id"):
        load_prior(tmp_path / "nothing" / "here")


@torch.no_grad()
def test_a_network_that_predicts_v_gives_the_noise_that_v_stands_for():
    """With the true v in place of the network, the noise comes back exactly (Salimans and Ho 2022, section 4)."""
    prior = Prior(small(), prediction_type="v_prediction").double()
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    t = torch.tensor([3, 990])
    abar = prior.schedule.abar(t).double().view(-1, 1, 1, 1)
    v = prior.target(x0, eps, t)
    torch.testing.assert_close(v, abar.sqrt() * eps - (1 - abar).sqrt() * x0, rtol=1e-12, atol=1e-12)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    prior.predict = lambda x, t: v
    torch.testing.assert_close(prior(x_t, t), eps, rtol=1e-6, atol=1e-6)


def test_what_a_prior_predicts_is_saved_with_it(tmp_path):
    prior = Prior(small(), prediction_type="v_prediction", schedule=Schedule(2e-4, 0.03, 500))
    save_prior(prior, tmp_path)
    loaded = load_prior(tmp_path)
    assert (loaded.prediction_type, loaded.schedule) == ("v_prediction", prior.schedule)
    x = noisy(size=16)
    torch.testing.assert_close(loaded(x, 300), prior(x, 300), rtol=1e-5, atol=1e-5)
    (tmp_path / "scheduler_config.json").write_text('{"beta_schedule": "scaled_linear"}')
    with pytest.raises(InputError, match="scaled_linear"):
        load_prior(tmp_path)
    (tmp_path / "scheduler_config.json").unlink()
    assert load_prior(tmp_path).prediction_type == "epsilon"
    with pytest.raises(ValueError, match="prediction_type"):
        Prior(small(), prediction_type="sample")
