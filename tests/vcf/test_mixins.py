"""What diffusers' own tests ask of a pipeline: where each is tested here, and which are excepted, with the reason.

The tests are those of PipelineTesterMixin, PipelineLatentTesterMixin, PipelineKarrasSchedulerTesterMixin and
SDFunctionTesterMixin in ``tests/pipelines/test_pipelines_common.py`` of diffusers 0.40, which no package installs.
"""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny
from PIL import Image

from support.tiny_models import build_pipeline
from vcf_batch.errors import ModelError
from vcf_batch.vcf.pipeline import VCFPipeline

_GPU = "needs a GPU: not run"
_NO_IMAGE = "asks nothing of a pipeline without an argument 'image'; references are tested in test_pipeline.py"

TESTS = {
    "test_save_load_local": "test_pipeline.test_save_and_load_keeps_everything",
    "test_save_load_optional_components": "test_mixins.test_optional_parts_stay_away",
    "test_pipeline_call_signature": "test_call.test_the_signature_has_every_argument",
    "test_inference_batch_consistent": "test_mixins.test_prompts_of_any_length_share_a_batch",
    "test_inference_batch_single_identical": "test_mixins.test_prompts_of_any_length_share_a_batch",
    "test_dict_tuple_outputs_equivalent": "test_call.test_result_types",
    "test_components_function": "test_mixins.test_components_are_those_of_the_constructor",
    "test_to_dtype": "test_mixins.test_dtypes_are_those_asked_for",
    "test_dtype_dict": "test_mixins.test_dtypes_are_those_asked_for",
    "test_dtype_alias": "test_mixins.test_dtypes_are_those_asked_for",
    "test_attention_slicing_forward_pass": "test_mixins.test_what_saves_memory_changes_no_image",
    "test_vae_slicing": "test_mixins.test_what_saves_memory_changes_no_image",
    "test_vae_tiling": "test_mixins.test_what_saves_memory_changes_no_image",
    "test_layerwise_casting_inference": "test_mixins.test_weights_may_be_stored_in_8_bits",
    "test_num_images_per_prompt": "test_call.test_further_images_of_a_prompt_are_further_draws",
    "test_cfg": "test_call.test_what_stable_diffusion_has_too_gives_the_same_images",
    "test_callback_inputs": "test_call.test_callback_sees_and_replaces_tensors",
    "test_callback_cfg": "test_call.test_callback_changes_guidance_and_tokens_with_effect",
    "test_serialization_with_variants": "test_mixins.test_variants_are_saved_and_loaded",
    "test_loading_with_variants": "test_mixins.test_variants_are_saved_and_loaded",
    "test_loading_with_incorrect_variants_raises_error": "test_mixins.test_variants_are_saved_and_loaded",
    "test_encode_prompt_works_in_isolation": "test_call.test_without_text_encoder_the_tokens_are_enough",
    "test_StableDiffusionMixin_component": "test_mixins.test_components_are_those_of_the_constructor",
    "test_pipeline_with_accelerator_device_map": "test_mixins.test_parts_are_loaded_onto_a_device",
    "test_pt_np_pil_outputs_equivalent": "test_call.test_result_types",
    "test_multi_vae": "test_mixins.test_other_vaes_decode",
    "test_karras_schedulers_shape": "test_call.test_the_pipelines_own_scheduler_samples",
    "test_freeu": "test_mixins.test_freeu_is_switched_on_and_off",
    "test_fused_qkv_projections": "test_attention.test_fused_projections_stay_in_use_with_references",
}
"""Where what each test asks for is tested here, as module and function."""

EXCEPTED = {
    "test_pipeline_call_signature": "there is no cross_attention_kwargs, by which the strength of references gets to "
    "the attention; the other arguments are there",
    "test_karras_schedulers_shape": "DPMSolverSDEScheduler draws noise of its own, and EDMEulerScheduler has no "
    "timesteps of Stable Diffusion: both are refused by name; the other thirteen pass",
    "test_save_load_optional_components": "with references, the aligner that it takes away is missed by name",
    "test_encode_prompt_works_in_isolation": "passes once diffusers.pipelines has the class, where it looks for the "
    "source",
    "test_pt_np_pil_inputs_equivalent": _NO_IMAGE,
    "test_latents_input": _NO_IMAGE,
    "test_float16_inference": _GPU,
    "test_save_load_float16": _GPU,
    "test_to_device": _GPU,
    "test_sequential_cpu_offload_forward_pass": _GPU,
    "test_sequential_offload_forward_pass_twice": _GPU,
    "test_model_cpu_offload_forward_pass": _GPU,
    "test_cpu_offload_forward_pass_twice": _GPU,
    "test_group_offloading_inference": _GPU,
    "test_pipeline_level_group_offloading_inference": _GPU,
    "test_pipeline_level_group_offloading_sanity_checks": _GPU,
    "test_xformers_attention_forwardGenerator_pass": "needs xformers, whose processors are refused with references",
}
"""What is not passed as it is, or not run, each with its reason."""

SETTINGS: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture
def pipeline() -> VCFPipeline:
    return build_pipeline()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8))


def quiet(pipeline: VCFPipeline) -> VCFPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_each_test_of_diffusers_is_tested_here_or_excepted() -> None:
    """All 42 of the four mixins; where one is in both tables, a part of it is excepted."""
    assert len(TESTS.keys() | EXCEPTED.keys()) == 42 and all(EXCEPTED.values())
    for name in TESTS.values():
        module, function = name.split(".")
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_optional_parts_stay_away(pipeline: VCFPipeline, picture: Image.Image, tmp_path: Path) -> None:
    expected = pipeline("a", **SETTINGS).images
    for name in pipeline._optional_components:
        setattr(pipeline, name, None)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(VCFPipeline.from_pretrained(tmp_path))
    assert all(getattr(loaded, name) is None for name in pipeline._optional_components)
    assert torch.equal(loaded("a", **SETTINGS).images, expected)
    with pytest.raises(ModelError, match="has no aligner"):
        loaded("a", picture, **SETTINGS)


def test_prompts_of_any_length_share_a_batch(pipeline: VCFPipeline, picture: Image.Image) -> None:
    prompts = ["a painting of a squirrel eating a burger", "a painting", 100 * "very long"]
    together = pipeline(prompts, picture, **SETTINGS | {"seed": [0, 1, 2]}).images
    for number, prompt in enumerate(prompts):
        alone = pipeline(prompt, picture, **SETTINGS | {"seed": number}).images[0]
        torch.testing.assert_close(together[number], alone, atol=1e-4, rtol=0)


def test_components_are_those_of_the_constructor(pipeline: VCFPipeline) -> None:
    parts = dict(pipeline.components)
    assert VCFPipeline(**parts).components == parts
    assert parts.keys() >= {"vae", "unet", "aligner", "image_encoder"}


def test_dtypes_are_those_asked_for(pipeline: VCFPipeline, tmp_path: Path) -> None:
    """One for all parts, or one for each."""
    pipeline.save_pretrained(tmp_path)
    names = ("vae", "text_encoder", "unet", "image_encoder", "aligner")
    half = VCFPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert {getattr(half, name).dtype for name in names} == {torch.float16}
    mixed = VCFPipeline.from_pretrained(tmp_path, dtype={"aligner": torch.bfloat16, "default": torch.float16})
    assert [getattr(mixed, name).dtype for name in names] == [torch.float16] * 4 + [torch.bfloat16]
    pipeline.to(dtype=torch.bfloat16)
    assert {getattr(pipeline, name).dtype for name in names} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["enable_attention_slicing", "vae.enable_slicing", "vae.enable_tiling"])
def test_what_saves_memory_changes_no_image(pipeline: VCFPipeline, picture: Image.Image, name: str) -> None:
    plain = pipeline(["a", "b"], picture, **SETTINGS).images
    part, _, method = name.rpartition(".")
    getattr(pipeline.vae if part else pipeline, method)()
    torch.testing.assert_close(pipeline(["a", "b"], picture, **SETTINGS).images, plain, atol=1e-3, rtol=0)


def test_weights_may_be_stored_in_8_bits(pipeline: VCFPipeline, picture: Image.Image) -> None:
    plain = pipeline("a", picture, **SETTINGS).images
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = pipeline("a", picture, **SETTINGS).images
    assert cast.isfinite().all() and not torch.equal(cast, plain)


def test_variants_are_saved_and_loaded(pipeline: VCFPipeline, tmp_path: Path) -> None:
    """By their name, and without it if a folder has no other weights; a variant that is not there is refused."""
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    assert [*(tmp_path / "fp16" / "aligner").glob("*.fp16.safetensors")]
    for settings in ({"variant": "fp16"}, {}):
        loaded = quiet(VCFPipeline.from_pretrained(tmp_path / "fp16", **settings))
        assert torch.equal(loaded("a", **SETTINGS).images, pipeline("a", **SETTINGS).images)
    pipeline.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="the model files of the `variant=fp16`"):
        VCFPipeline.from_pretrained(tmp_path / "plain", variant="fp16")


def test_parts_are_loaded_onto_a_device(pipeline: VCFPipeline, picture: Image.Image, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(VCFPipeline.from_pretrained(tmp_path, device_map="cpu"))
    expected = pipeline("a", picture, **SETTINGS).images
    torch.testing.assert_close(loaded("a", picture, **SETTINGS).images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["asymmetric", "tiny"])
def test_other_vaes_decode(pipeline: VCFPipeline, kind: str) -> None:
    channels: Any = (16, 16)
    if kind == "tiny":
        vae: Any = AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    else:
        vae = AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            down_block_out_channels=channels,
            up_block_types=("UpDecoderBlock2D",) * 2,
            up_block_out_channels=channels,
            latent_channels=4,
            norm_num_groups=8,
        )
    other = quiet(VCFPipeline(**{**pipeline.components, "vae": vae.eval()}))
    image = other("a", **SETTINGS).images
    assert image.shape == pipeline("a", **SETTINGS).images.shape and image.min() >= 0 and image.max() <= 1


def test_freeu_is_switched_on_and_off(pipeline: VCFPipeline, picture: Image.Image) -> None:
    plain = pipeline("a", picture, **SETTINGS).images
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.allclose(pipeline("a", picture, **SETTINGS).images, plain, atol=1e-3)
    pipeline.disable_freeu()
    assert torch.equal(pipeline("a", picture, **SETTINGS).images, plain)
