"""Diagonal distillation: training sees what inference does, and each part of the loss its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from socket import socket

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from sdvg.models.embedded import WEIGHTS
from sdvg.models.wan import CausalWan
from sdvg.schedule import Schedule, preset
from sdvg.train import diagonal_distill, transformer
from sdvg.train.distiller import Distiller, Settings, _match, _match_flow
from sdvg.train.forcing import BlockForward
from tests.models.test_checkpoints import plain, saved

BLOCKS = 4
PROMPTS = ["a two moving up", "a six"]


def text(prompts: list[str]) -> Tensor:
    return torch.stack(
        [torch.randn(24, 128, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
    )


def distiller(
    settings: Settings, dtype: torch.dtype = torch.float32, **options: object
) -> Distiller:
    torch.manual_seed(torch.seed() % 2**31)
    teacher, student = transformer.build("drafter"), transformer.build("drafter")
    for model in (teacher, student):
        for parameter in model.parameters():
            if parameter.ndim < 2:
                torch.nn.init.normal_(parameter, std=0.3)

    def cached(model: torch.nn.Module) -> CausalWan:
        return CausalWan(model, text, height=4, width=4, sink_frames=3, window_frames=6)

    return Distiller(
        teacher, student, text, cached, blocks=BLOCKS, dtype=dtype, settings=settings, **options
    )


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(forcing=False),
        Settings(context_noise=0.1),
        Settings(repair=0.5),
        Settings(schedule=preset("self_forcing")),
        Settings(schedule=Schedule(((1000.0, 300.0),), clean_pass=False)),
    ],
    ids=["diagonal", "no-forcing", "context-noise", "repair", "clean-pass", "flat"],
)
def test_the_training_forward_is_the_last_step_of_the_roll_out(settings: Settings) -> None:
    made = distiller(settings)
    g = torch.Generator().manual_seed(3)
    rollout = made.roll_out(PROMPTS, g)
    with torch.no_grad():
        again = made.again(rollout, text(PROMPTS), g)
    torch.testing.assert_close(again, rollout.latents, atol=2e-4, rtol=1e-4)


def test_an_earlier_step_attends_to_the_keys_of_the_last() -> None:
    made = distiller(Settings())
    g = torch.Generator().manual_seed(4)
    rollout = made.roll_out(PROMPTS, g)
    with torch.no_grad():
        again = made.again(rollout, text(PROMPTS), g, last=False)
    # blocks 2 and 3 have one earlier step: their second input holds what it made
    for block in (2, 3):
        first, second = rollout.inputs[block]
        sigma = made.steps[block][-1] / 1000
        part = again[:, :, 3 * block : 3 * block + 3]
        noise = (second - (1 - sigma) * part) / sigma
        # the noise of the second step, which is standard normal where the first step is right
        assert abs(float(noise.std()) - 1) < 0.15
        assert not torch.equal(first, second)


def test_the_gradient_reaches_earlier_blocks_through_their_keys() -> None:
    made = distiller(Settings())
    g = torch.Generator().manual_seed(5)
    rollout = made.roll_out(PROMPTS, g)
    noisy = torch.cat([seen[-1] for seen in rollout.inputs], 2).requires_grad_()
    sigma = torch.full((2, BLOCKS), 0.3571)
    velocity = made.forward(made.student, noisy, sigma, text(PROMPTS))
    (gradient,) = torch.autograd.grad(velocity[:, :, -3:].square().sum(), noisy)
    reached = gradient.unflatten(2, (BLOCKS, -1)).abs().amax((0, 1, 3, 4, 5))
    assert (reached > 0).all()
    velocity = made.forward(made.student, noisy, sigma, text(PROMPTS))
    (gradient,) = torch.autograd.grad(velocity[:, :, :3].square().sum(), noisy)
    assert not gradient[:, :, 3:].any()


def test_checkpointing_changes_no_gradient() -> None:
    made = distiller(Settings())
    g = torch.Generator().manual_seed(6)
    rollout = made.roll_out(PROMPTS, g)
    found = []
    for checkpointing in (False, True):
        made.forward.checkpointing = checkpointing
        made.student.zero_grad()
        made.again(rollout, text(PROMPTS), g).square().sum().backward()
        found.append([p.grad.clone() for p in made.student.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_distribution_matching_moves_along_real_less_fake() -> None:
    made, real, fake = torch.randn(3, 2, 4, 6, 2, 2).unbind(0)
    made.requires_grad_()
    (gradient,) = torch.autograd.grad(_match(made, real, fake, 2) * made.numel(), made)
    for block in (slice(0, 3), slice(3, 6)):
        far = (made - real)[:, :, block].abs().mean((1, 2, 3, 4), keepdim=True)
        expected = (fake - real)[:, :, block] / far
        torch.testing.assert_close(gradient[:, :, block], expected, rtol=1e-4, atol=1e-5)
    # with equal scores nothing is to be learnt
    (gradient,) = torch.autograd.grad(_match(made, real, real.clone(), 2), made)
    assert not gradient.any()


def test_flow_matching_sees_differences_alone() -> None:
    made, real, fake = torch.randn(3, 2, 4, 6, 2, 2).unbind(0)
    made.requires_grad_()
    still = torch.randn(2, 4, 1, 2, 2)
    losses = [_match_flow(made, *pair) for pair in ((real, fake), (real + still, fake - still))]
    torch.testing.assert_close(*losses)
    (gradient,) = torch.autograd.grad(losses[0], made)
    # a push on a difference moves its two frames against each other
    torch.testing.assert_close(gradient.sum(2), torch.zeros(2, 4, 2, 2), atol=1e-6, rtol=0)
    assert gradient.any()


def test_only_the_student_and_the_model_of_its_videos_learn() -> None:
    made = distiller(Settings(), torch.bfloat16)
    fake = transformer.build("drafter")
    losses = made.distil(fake, PROMPTS, torch.Generator().manual_seed(7))
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert {"distribution", "flow", "fake"} <= {*losses}
    for model in (made.student, fake):
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None for p in made.teacher.parameters())
    none = distiller(Settings(flow=0.0), torch.bfloat16)
    assert "flow" not in none.distil(fake, PROMPTS, torch.Generator().manual_seed(7))


def test_roll_outs_follow_the_weights_that_are_trained() -> None:
    made = distiller(Settings())
    before = made.roll_out(PROMPTS, torch.Generator().manual_seed(8)).latents
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter.mul_(1.1)
    after = made.roll_out(PROMPTS, torch.Generator().manual_seed(8))
    assert not torch.equal(before, after.latents)
    with torch.no_grad():
        again = made.again(after, text(PROMPTS), torch.Generator().manual_seed(9))
    torch.testing.assert_close(again, after.latents, atol=1e-3, rtol=1e-3)


def run(out: Path, *more: str) -> None:
    diagonal_distill.main(
        ["--out", str(out), "--runs", str(out.parent / "runs"), "--device", "cpu",
         "--model", "drafter", "--score", "drafter", "--clips", "16", "--batch", "2",
         "--rollouts", "2",
         "--warm-up", "2", "--steps", "2", "--threads", "1", *more]
    )  # fmt: skip


def test_a_resumed_run_equals_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    run(tmp_path / "whole")
    # broken off between two steps of the second phase: two models, two optimisers, two averages
    distil, calls = Distiller.distil, []

    def broken(*arguments: object) -> dict[str, Tensor]:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return distil(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(diagonal_distill, "fit", partial(diagonal_distill.fit, save_every=1))
        patch.setattr(Distiller, "distil", broken)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken")
    run(tmp_path / "broken", "--resume")
    name = "diffusion_pytorch_model.safetensors"
    whole, broken = (load_file(tmp_path / part / name) for part in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(value, broken[key]) for key, value in whole.items())
    for folder in ("whole", "whole/teacher"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        # where the model once came from is nobody's business
        assert not config.get("_name_or_path")
    notes = json.loads((tmp_path / "whole" / "distillation.json").read_text())
    assert notes["timesteps"] == [list(steps) for steps in preset("diagonal").timesteps]
    assert (notes["forcing"], notes["flow"], notes["clean_pass"]) == (True, 1, False)
    with pytest.raises(ValueError, match=r"of the run that is resumed, got another flow; give"):
        run(tmp_path / "broken", "--resume", "--flow", "0")


TWO = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from sdvg.train.loop import fit

def trained(name, ranks, accelerator=None):
    torch.manual_seed(0)
    net = torch.nn.Linear(16, 16)
    def loss(g, step):
        draws = [g] if ranks is None else [
            torch.Generator().manual_seed(rank * 715_827_883 + step) for rank in ranks
        ]
        parts = [net(torch.randn(8, 16, generator=g)).square().mean() for g in draws]
        return {"loss": sum(parts) / len(parts)}
    fit(name, net, loss, steps=5, lr=1e-2, runs=Path(sys.argv[1]), accelerator=accelerator)
    return net.weight.detach()

accelerator = Accelerator(cpu=True)
together = trained("together", None, accelerator)
both = accelerator.gather(together[None])
assert accelerator.num_processes == 2 and torch.equal(both[0], both[1])
if accelerator.is_main_process:
    torch.testing.assert_close(together, trained("alone", (0, 1)))
    assert not torch.equal(together, trained("half", (0,)))
"""


def test_two_processes_train_as_one_with_both_batches(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    made = []
    for rank in range(2):
        given = {name: str(value) for name, value in (world | {"RANK": rank}).items()}
        environment = os.environ | given | {"LOCAL_RANK": str(rank)}
        command = [sys.executable, str(script), str(tmp_path)]
        made.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=300)[1] for process in made]
    finally:
        # one waits for the other for half an hour
        for process in made:
            process.kill()
            process.wait()
    assert [process.returncode for process in made] == [0, 0], said


@pytest.mark.parametrize("form", ["diffusers", "original"])
def test_any_wan_teacher_trains_a_student_that_the_pipeline_runs(tmp_path: Path, form: str) -> None:
    from diffusers import WanTransformer3DModel

    from sdvg import SDVGPipeline

    torch.manual_seed(3)
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=128, freq_dim=32, ffn_dim=64, num_layers=2,
    )  # fmt: skip
    teacher = tmp_path / "teacher"
    if form == "diffusers":
        model.save_pretrained(teacher)
    else:
        teacher = saved(tmp_path / "longlive_base.pt", {"generator": plain(model, "model.")})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a six\n\na two moving up\n")
    out = tmp_path / "student"
    diagonal_distill.main(
        ["--out", str(out), "--teacher", str(teacher), "--text", str(WEIGHTS), "--device", "cpu",
         "--prompts", str(prompts), "--height", "32", "--width", "32", "--blocks", "2",
         "--warm-up", "0", "--steps", "1", "--rollouts", "1", "--guidance", "3", "--shift", "5",
         "--threads", "1", "--checkpointing"]
    )  # fmt: skip
    pipe = SDVGPipeline.from_checkpoints(
        base=WEIGHTS, target=out, recipe="diagonal", dtype=torch.float32, height=32, width=32
    )
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a six", num_blocks=2, generator=1, output_type="latent").frames
    assert made.isfinite().all()
    moved = [
        (one - other).abs().max()
        for one, other in zip(pipe.transformer.parameters(), model.parameters(), strict=True)
    ]
    assert max(moved) > 0
    # the run is another with other prompts or sizes
    notes = json.loads((out / "distillation.json").read_text())
    assert (notes["prompts"], notes["window_frames"]) == (str(prompts), 9)


def test_the_loss_at_both_ends_of_a_log_is_told(tmp_path: Path) -> None:
    log = tmp_path / "warm-up.csv"
    log.write_text("step,seconds,lr,loss\n20,1,1,1.5\n")
    assert diagonal_distill._change(log) == "loss 1.500"
    log.write_text(log.read_text() + "40,2,1,0.5\n60,3,1,0.25\n")
    assert diagonal_distill._change(log) == "loss 1.500 at first, 0.250 at last"


def test_prompts_are_kept_without_their_padding() -> None:
    text = diagonal_distill.Text(WEIGHTS, torch.device("cpu"))
    embedded = text(["a six", "a two moving up", "a six"])
    assert embedded.shape == (3, 512, 128)
    assert torch.equal(embedded[0], embedded[2])
    lengths = [len(text._known[prompt]) for prompt in ("a six", "a two moving up")]
    assert lengths[0] < lengths[1] < 10
    for row, length in zip(embedded, lengths, strict=False):
        assert row[:length].any(1).all()
        assert not row[length:].any()


def test_a_window_that_the_masks_cannot_make_is_refused() -> None:
    """It once left the sink out where a block sees nothing but the sink and itself."""
    model = transformer.build("drafter")
    sizes = {"blocks": 3, "frames": 3, "height": 4, "width": 4}
    for window, sink in ((3, 3), (4, 0)):
        with pytest.raises(ValueError, match=f"at least two blocks, 6, got {window}"):
            BlockForward(model, window_frames=window, sink_frames=sink, **sizes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--teacher", "x"], "--teacher must come with --text"),
        (["--schedule", "sideways"], "schedule: preset must be one of"),
        (["--runs", "nowhere"], "base.pt must exist, which stage base writes"),
        (["--flow", "-1"], "flow must be at least 0, got -1"),
        (["--context-noise", "0"], "context_noise must lie in"),
        (["--levels", "0.9", "0.3"], "levels must rise within"),
        (["--schedule", "krea_5"], "schedule must end above 0"),
        (["--context-noise", "0.1", "--no-forcing"], "must be None without diagonal forcing"),
        (["--steps", "-1"], "steps must be at least 0, got -1"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--lr", "0"], "lr must be above 0, got 0"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        diagonal_distill.main(["--out", str(tmp_path / "out"), "--device", "cpu", *arguments])
