"""The spatial decoder's contract: rows and frames do not leak into each other, and inputs matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bridge_stg.model.spatial_decoder import Localization, move_boxes, patch_sides
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.training.loss.losses import box_iou_giou, contrastive_loss, heat_target, spatial_losses


def feeds(model, queries: int, frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    language, vision = model.spec.language, model.spec.vision
    taps = (len(language.tapped_layers), queries, language.num_bridging_queries, language.hidden_size)
    return {
        "feature_map": rng.standard_normal((frames, 4, 6, vision.hidden_size), dtype=np.float32),
        "taps": rng.standard_normal(taps, dtype=np.float32),
        "frame_times": np.cumsum(rng.uniform(0.1, 0.5, frames)).astype(np.float32),
        "frame_mask": np.ones((queries, frames), bool),
    }


def test_a_batched_row_equals_the_query_alone(tiny_model):
    session = TorchSession("spatial_decoder", tiny_model)
    batch = feeds(tiny_model, 3, 7)
    batch["frame_mask"][1, 4:] = False
    batch["frame_mask"][2, :2] = False
    together = session.infer(batch)
    for row in range(3):
        keep = batch["frame_mask"][row]
        alone = session.infer({
            "feature_map": batch["feature_map"][keep], "taps": batch["taps"][:, row : row + 1],
            "frame_times": batch["frame_times"][keep], "frame_mask": np.ones((1, keep.sum()), bool),
        })  # fmt: skip
        np.testing.assert_allclose(together["boxes"][row, keep], alone["boxes"][0], atol=1e-5)
        np.testing.assert_allclose(together["presence"][row, keep], alone["presence"][0], atol=1e-5)


def test_masked_frames_take_no_part(tiny_model):
    session = TorchSession("spatial_decoder", tiny_model)
    batch = feeds(tiny_model, 1, 5)
    batch["frame_mask"][0, 3:] = False
    before = session.infer(batch)
    batch["feature_map"][3:] *= -7
    after = session.infer(batch)
    np.testing.assert_array_equal(before["boxes"][:, :3], after["boxes"][:, :3])
    batch["frame_mask"][:] = True
    assert np.abs(session.infer(batch)["presence"][:, :3] - before["presence"][:, :3]).max() > 1e-6


@pytest.mark.parametrize("name", ["feature_map", "taps"])
def test_boxes_depend_on_the_input(tiny_model, name):
    session = TorchSession("spatial_decoder", tiny_model)
    first, second = feeds(tiny_model, 1, 4), feeds(tiny_model, 1, 4, seed=1)
    moved = session.infer({**first, name: second[name]})["boxes"] - session.infer(first)["boxes"]
    assert np.abs(moved).max() > 0.1


def test_boxes_and_presence_are_in_range(tiny_model):
    out = TorchSession("spatial_decoder", tiny_model).infer(feeds(tiny_model, 2, 3))
    assert out["boxes"].shape == (2, 3, 4) and out["presence"].shape == (2, 3)
    for array in out.values():
        assert array.dtype == np.float32 and array.min() >= 0 and array.max() <= 1


def test_votes_and_moves_mean_the_same_at_every_aspect_ratio():
    wide, upright = patch_sides(9, 16), patch_sides(16, 9)
    assert torch.allclose(wide * torch.tensor([16, 9, 16, 9]), upright * torch.tensor([9, 16, 9, 16]))
    box, delta = torch.tensor([0.5, 0.5, 0.2, 0.1]), torch.tensor([0.5, -1.0, 0.7, -0.3])
    squeezed = torch.tensor([0.5, 1.0, 0.5, 1.0])
    assert torch.allclose(move_boxes(box * squeezed, delta), move_boxes(box, delta) * squeezed)
    assert torch.allclose(move_boxes(box, torch.zeros(4)), box)
    assert (move_boxes(box, torch.full((4,), 9.0)) <= 1).all()


def test_iou_and_giou_on_hand_worked_boxes():
    first = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.25, 0.5, 0.1, 0.2], [0.4, 0.4, 0.2, 0.2]])
    second = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.75, 0.5, 0.1, 0.2], [0.5, 0.4, 0.2, 0.2]])
    iou, giou = box_iou_giou(first, second)
    torch.testing.assert_close(iou, torch.tensor([1.0, 0.0, 1 / 3]), atol=1e-4, rtol=0)
    torch.testing.assert_close(giou, torch.tensor([1.0, -(0.12 - 0.04) / 0.12, 1 / 3]), atol=1e-4, rtol=0)


def test_heat_target_lies_on_the_box():
    target = heat_target(torch.tensor([0.5, 0.5, 0.5, 0.5]), 8, 8).reshape(8, 8)
    assert target.sum().item() == pytest.approx(1) and target[2:6, 2:6].sum() > 0.99
    small = heat_target(torch.tensor([0.95, 0.05, 0.02, 0.02]), 8, 8).reshape(8, 8)
    assert small.argmax() == 7


def localization(boxes: torch.Tensor, presence: torch.Tensor, summary: torch.Tensor, content: torch.Tensor):
    return Localization([boxes], [presence], torch.zeros(*presence.shape, 4), content, summary)


def test_losses_vanish_for_a_perfect_answer_and_grow_otherwise(tiny_model):
    config = tiny_model.config.losses
    truth = torch.rand(1, 2, 3, 4) * 0.3 + 0.3
    positive = torch.tensor([[[True, True, False], [False, True, True]]])
    valid = torch.ones_like(positive)
    sure = torch.where(positive, 20.0, -20.0)
    axis = torch.eye(2)[None, :, :]
    content = torch.where(positive[..., None], axis[:, :, None], -axis[:, :, None])
    good, iou = spatial_losses(localization(truth, sure, axis, content), truth, positive, valid, (2, 2), config)
    assert iou.item() == pytest.approx(1, abs=1e-4)
    assert all(good[k].item() < 1e-3 for k in ("l1", "giou", "presence", "contrastive"))
    bad, _ = spatial_losses(localization(truth * 0.5, -sure, axis, -content), truth, positive, valid, (2, 2), config)
    assert all(bad[k].item() > good[k].item() + 0.05 for k in ("l1", "giou", "presence", "contrastive"))


def test_contrastive_loss_ignores_frames_that_do_not_count():
    summary, content = torch.randn(1, 1, 4), torch.randn(1, 1, 3, 4)
    positive, valid = torch.tensor([[[True, False, False]]]), torch.tensor([[[True, True, False]]])
    found = localization(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3), summary, content)
    first = contrastive_loss(found, positive, valid, 0.1)
    content[0, 0, 2] = 100 * summary[0, 0]
    assert contrastive_loss(found, positive, valid, 0.1).item() == pytest.approx(first.item())
