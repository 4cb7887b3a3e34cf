"""Priors: what the network's prediction means, every way in and out of a file, and gradients through it.

The published DDPM layout is compared with the published figures in test_golden.py.
"""

import copy
import json

import huggingface_hub
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from helpers import refused
from test_golden import FIGURES, weights

from checkpoints import read_weights, write_weights
from DDNM.guided_diffusion.prior import Prior, load_prior, prior_from_ddpm, save_prior, small_unet
from DDNM.guided_diffusion.schedule import Schedule

DDPM, SIZE = FIGURES["unet_tiny"]["model"], FIGURES["unet_tiny"]["image_size"]
MODEL = "diffusion_pytorch_model.safetensors"
STEPS = torch.arange(1000)


def noisy(batch=2, size=16):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def small(size=16, **options):
    torch.manual_seed(0)
    return small_unet(size, **{"channels": (8, 16), "norm_groups": 4, "attention_size": 4, **options})


def plain(channels=3, predicted=3, size=16, **options):
    """diffusers' own smallest U-Net."""
    torch.manual_seed(0)
    return UNet2DModel(size, channels, predicted, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **options)  # fmt: skip


# --- The network -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_unshuffled_prior_is_its_unet_between_two_rearrangements():
    prior = Prior(small())
    x, t = noisy(), torch.tensor([5, 900])
    assert prior.image_size == 16 and prior.unshuffle == 2 and prior.unet.config.in_channels == 12
    by_hand = x.unflatten(2, (8, 2)).unflatten(4, (8, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    expected = prior.unet(by_hand, t).sample
    expected = expected.unflatten(1, (3, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    assert torch.equal(prior(x, t), expected)


@torch.no_grad()
def test_steps_may_be_numbers_and_the_dtype_is_the_inputs():
    prior = Prior(small(unshuffle=1))
    x = noisy()
    out = prior(x, torch.tensor([7, 7]))
    for t in (7, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        torch.testing.assert_close(prior(x, t), out)
    assert prior(x.double(), 7).dtype == torch.float64
    for shape in ((2, 3, 16, 8), (2, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\)"):
            prior(torch.zeros(shape), 0)


@torch.no_grad()
def test_channels_last_and_autocast_change_only_the_rounding_and_a_predicted_variance_nothing():
    x, t = noisy(), torch.tensor([5, 900])
    exact = Prior(small())(x, t)
    torch.testing.assert_close(Prior(small(), channels_last=True)(x, t), exact, rtol=1e-4, atol=1e-5)
    rounded = Prior(small(), autocast=torch.bfloat16)(x, t)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)
    unet = plain(predicted=6)
    assert torch.equal(Prior(unet)(x, 3), unet(x, 3).sample[:, :3])


@pytest.mark.parametrize("build, options, said", [
    (plain, {"channels": 4, "predicted": 4}, "3 k\\^2"), (plain, {"predicted": 4}, "3 k\\^2"),
    (plain, {"size": None}, "square sample_size"), (plain, {"time_embedding_type": "fourier"}, "must take time steps"),
    (plain, {"center_input_sample": True}, "must not centre"), (plain, {"num_class_embeds": 10}, "class-conditional"),
    (plain, {"class_embed_type": "timestep"}, "class-conditional"),
    (small, {"size": 10}, "divisible by 4"), (small, {"channels": (8, 10)}, "divisible by"),
])  # fmt: skip
def test_other_networks_are_no_prior(build, options, said):
    with pytest.raises(ValueError, match=said):
        Prior(build(**options))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule(betas=[0.1, 0.3, 0.999])], ids=["linear", "other"])
def test_a_true_prediction_of_any_kind_gives_the_noise(kind, schedule):
    """With the true target in the network's place the noise comes back (v: Salimans and Ho 2022, section 4)."""
    prior = Prior(small(), prediction_type=kind, schedule=schedule).double()
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    t = torch.tensor([1, schedule.num_diffusion_timesteps - 1])
    abar = schedule.abar(t).double().view(-1, 1, 1, 1)
    true = {"epsilon": eps, "sample": x0, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x0}[kind]
    torch.testing.assert_close(prior.target(x0, eps, t), true, rtol=1e-12, atol=1e-12)
    prior.predict = lambda x, t: true
    torch.testing.assert_close(prior(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t), eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_picture_is_predicted_from_nothing_but_noise(kind):
    """abar_{T-1} = 0: x0 = (x - sqrt(1 - abar) eps) / sqrt(abar) is still the picture that the network predicts."""
    betas = DDPMScheduler(rescale_betas_zero_snr=True).betas
    assert betas[-1] == 1
    prior = Prior(small(), prediction_type=kind, schedule=Schedule(betas=betas))
    x, picture = noisy(), noisy().flip(0).clamp(-1, 1)
    prior.predict = lambda x, t: picture if kind == "sample" else -picture
    abar = prior.schedule.abar(999)
    x0 = (x - (1 - abar).sqrt() * prior(x, 999)) / abar.sqrt()
    torch.testing.assert_close(x0, picture, rtol=0, atol=0.02)


# --- Gradients -------------------------------------------------------------------------------------------------------


def gradient(prior):
    """d/dx of a number made of eps, and the bytes that autograd kept for it."""
    kept, x = [], noisy().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a.nbytes) or a, lambda a: a):
        value = (prior(x, 300) * noisy()).sum()
    return torch.autograd.grad(value, x)[0], sum(kept)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_gradients_go_through_a_frozen_prior_to_its_image(tmp_path, kind):
    save_prior(Prior(small(), prediction_type=kind), tmp_path)
    prior, x = load_prior(tmp_path).double(), noisy().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prior(x, 300), x, fast_mode=True)
    assert all(p.grad is None and not p.requires_grad for p in prior.parameters())


def test_recomputing_gives_the_same_gradient_from_less_memory(tmp_path):
    save_prior(Prior(small()), tmp_path)
    exact, kept = gradient(load_prior(tmp_path))
    again, less = gradient(copy.deepcopy(load_prior(tmp_path, recompute=True)))
    torch.testing.assert_close(again, exact, rtol=1e-5, atol=1e-6)
    assert less < 0.7 * kept
    rounded, _ = gradient(load_prior(tmp_path, autocast=torch.bfloat16, recompute=True))
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() < 0.05 * exact.norm()


# --- Files -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_prior_is_loaded_in_float32(tmp_path):
    prior = Prior(small(), prediction_type="v_prediction", schedule=Schedule(2e-4, 0.03, 500))
    save_prior(prior, tmp_path / "prior", torch.float16)
    loaded = load_prior(tmp_path / "prior", image_size=16)
    assert (loaded.prediction_type, loaded.schedule) == ("v_prediction", prior.schedule)
    torch.testing.assert_close(loaded(noisy(), 300), prior(noisy(), 300), rtol=2e-2, atol=2e-2)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    assert all(v.dtype == torch.float16 for v in read_weights(tmp_path / "prior" / MODEL).values())
    refused("16x16 images, not 64", load_prior, tmp_path / "prior", image_size=64)


@torch.no_grad()
def test_folders_with_the_old_attention_names_are_read(tmp_path):
    """google/ddpm-ema-celebahq-256 was published before diffusers renamed them."""
    prior = Prior(small())
    save_prior(prior, tmp_path)
    state = read_weights(tmp_path / MODEL)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    write_weights(tmp_path / MODEL, state)
    torch.testing.assert_close(load_prior(tmp_path)(noisy(), 500), prior(noisy(), 500), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"safe_serialization": False}], ids=str)
@pytest.mark.parametrize("pipeline", [False, True])
def test_what_diffusers_writes_is_read(tmp_path, options, pipeline):
    """A U-Net's folder or a pipeline's, safetensors or .bin, in halves; a pipeline's unet/ alone stands for all."""
    unet = plain().half() if "variant" in options else plain()
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="sample")
    if pipeline:
        DDPMPipeline(unet, DDPMScheduler.from_config(scheduler.config)).save_pretrained(tmp_path)
        (tmp_path / "unet" / MODEL).unlink()
        unet.save_pretrained(tmp_path / "unet", **options)
    else:
        unet.save_pretrained(tmp_path, **options)
        scheduler.save_pretrained(tmp_path / "scheduler" if "variant" in options else tmp_path)
    for source in (tmp_path, tmp_path / "unet") if pipeline else (tmp_path,):
        prior = load_prior(source)
        assert prior.prediction_type == "sample"
        torch.testing.assert_close(prior.schedule.abar(STEPS), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
        for name, tensor in unet.state_dict().items():
            assert torch.equal(prior.unet.state_dict()[name], tensor.float())


@pytest.mark.parametrize("settings", [
    {"trained_betas": torch.linspace(1e-5, 5e-3, 1000).tolist()},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"beta_start": 1e-3, "beta_end": 0.05}, {"kind": HeunDiscreteScheduler}, {"kind": LCMScheduler},
], ids=lambda settings: str(next(iter(settings.items())))[:40])  # fmt: skip
def test_a_schedulers_settings_are_honoured(tmp_path, settings):
    """And kept when the prior is saved again."""
    kind = settings.get("kind", DDPMScheduler)
    scheduler = kind(**{key: value for key, value in settings.items() if key != "kind"})
    plain().save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    if kind is not DDPMScheduler:  # a class with other betas than DDPM's, which its file need not say
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": kind.__name__}))
    prior = load_prior(tmp_path)
    torch.testing.assert_close(prior.schedule.abar(STEPS), scheduler.alphas_cumprod, rtol=1e-3, atol=1e-8)
    assert prior.prediction_type == settings.get("prediction_type", "epsilon")
    save_prior(prior, tmp_path / "again")
    assert load_prior(tmp_path / "again").schedule == prior.schedule
    again = DDPMScheduler.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("settings, said", [
    ({"beta_schedule": "of_my_own"}, "of_my_own"),
    ({"prediction_type": "flow"}, "prediction_type must be one of"),
    ({"rescale_betas_zero_snr": True}, "says nothing of a picture"),
    ({"trained_betas": [0.1, 2.0], "num_train_timesteps": 2}, "betas must be"),
    ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 1000}, "trained_betas are 2, num_train_timesteps 1000"),
    ({"_class_name": "ScoreSdeVeScheduler"}, "not known to add noise as DDPM does"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction"},
     "takes noise levels, not steps"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "not known to add noise as DDPM does"),
    ({"_class_name": "MyOwnScheduler"}, "no schedule: .*MyOwn"), ({"_class_name": "UNet2DModel"}, "is no scheduler"),
])  # fmt: skip
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, settings, said):
    plain().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
    assert str(tmp_path) in refused(said, load_prior, tmp_path)


def changed(name, **change):
    """Of a folder: a JSON file in it says something else."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))


@pytest.mark.parametrize("harm, said", [
    (changed("model_index.json", vqvae=["diffusers", "VQModel"]), "draws latents"),
    (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "has no scheduler/scheduler_config"),
    (changed("unet/config.json", _class_name="UNet2DConditionModel"), "its network is a UNet2DConditionModel"),
    (changed("unet/config.json", block_out_channels="4"), "no network"),
    (changed("unet/config.json", layers_per_block=2), "missing down_blocks"),
    (lambda folder: write_weights(folder / "unet" / MODEL, plain().state_dict() | {"foreign.weight": torch.ones(1)}),
     "unexpected foreign.weight"),
    (lambda folder: (folder / "unet" / MODEL).write_bytes(b"damaged"), "damaged"),
    (lambda folder: (folder / "unet" / MODEL).unlink(), f"has none of {MODEL}"),
    (lambda folder: (folder / "unet" / "config.json").unlink(), "has neither config.json nor unet/config.json"),
    (lambda folder: folder.rename(f"{folder}s"), "not a hub id"),
])  # fmt: skip
def test_a_folder_that_is_no_prior_is_refused(tmp_path, harm, said):
    DDPMPipeline(plain(), DDPMScheduler()).save_pretrained(tmp_path / "prior")
    harm(tmp_path / "prior")
    refused(said, load_prior, tmp_path / "prior")


def test_a_file_in_the_published_layout(tmp_path):
    state = weights(FIGURES["unet_tiny"]["state_dict"])
    path = tmp_path / "celeba.ckpt"
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    with torch.no_grad():
        expected = prior_from_ddpm(state, DDPM, SIZE)(noisy(size=SIZE), 10)
        for settings in ((DDPM, SIZE), ()):  # given, or read off the weights
            assert torch.equal(load_prior(path, *settings)(noisy(size=SIZE), 10), expected)
    for change, said in [
        ({"attn_resolutions": []}, "unexpected"), ({"ch": 64}, "has shape"), ({"ch_mult": None}, "makes no network"),
        ({"ch_mult": [1] * 9}, "divisible"),
    ]:  # fmt: skip
        refused(f"prior .*celeba.ckpt: .*{said}", load_prior, path, DDPM | change, SIZE)
    refused("makes no network .*'ch'", load_prior, path, {k: v for k, v in DDPM.items() if k != "ch"}, SIZE)
    write_weights(path, {k: v for k, v in state.items() if ".attn" not in k})
    refused("give image_size", load_prior, path)
    write_weights(path, {"weight": torch.ones(2)})
    refused("no weights in the published DDPM layout: there is no conv_in", load_prior, path)


def test_a_hub_prior_loads_offline_if_the_cache_knows_all_of_it(tmp_path, monkeypatch):
    """That a repository has no scheduler_config.json too. What the cache does not know is said."""
    snapshot = tmp_path / "models--me--prior" / "snapshots" / ("a" * 40)
    absent = tmp_path / "models--me--prior" / ".no_exist" / ("a" * 40)
    absent.mkdir(parents=True)
    (tmp_path / "models--me--prior" / "refs").mkdir()
    (tmp_path / "models--me--prior" / "refs" / "main").write_text("a" * 40)
    plain().save_pretrained(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub = {"cache_dir": str(tmp_path)}
    refused("me/prior: scheduler_config.json is not in the cache.*OFFLINE", load_prior, "me/prior", **hub)
    (absent / "scheduler_config.json").touch()
    assert load_prior("me/prior", **hub).prediction_type == "epsilon"
    refused("me/other: config.json is not in the cache", load_prior, "me/other", **hub)
