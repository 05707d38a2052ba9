"""DistilledFCOS, where detectron2 has an FCOS (its main branch: make test-upstream)."""

import copy

import pytest
import torch
from torch.testing import assert_close

from kd_core.losses import DKDLoss
from kd_core.utils.errors import UserError
from kd_det import Teacher
from kd_det.compat import FCOS, FCOSHead
from kd_det.config import kd_defaults
from kd_det.modeling.meta_arch import dense
from kd_det.modeling.sigmoid_loss import BinaryDKDLoss


def test_there_is_a_distilled_fcos_where_detectron2_has_an_fcos():
    assert hasattr(dense, "DistilledFCOS") == (FCOS is not None)


if FCOS is not None:  # a test that is skipped would hide another that is

    def build(retinanet, kind, seed=0, **more):
        """An FCOS on the backbone of the tiny RetinaNet."""
        backbone = retinanet().backbone
        torch.manual_seed(seed)
        features = ["p3", "p4", "p5"]
        shapes = [backbone.output_shape()[name] for name in features]
        head = FCOSHead(input_shape=shapes, num_classes=10, conv_dims=[8], norm="", prior_prob=0.3)
        pixels = {"pixel_mean": (100.0,) * 3, "pixel_std": (50.0,) * 3}
        return kind(backbone=backbone, head=head, head_in_features=features, num_classes=10, **pixels, **more)

    def five_steps(model, batch):
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), []
        for _ in range(5):
            optimizer.zero_grad()
            losses.append(model(copy.deepcopy(batch)))
            sum(losses[-1].values()).backward()
            optimizer.step()
        return losses, model.state_dict()

    def test_without_a_loss_it_is_an_fcos_to_the_bit_for_five_steps(retinanet, batch, storage):
        with torch.jit.optimized_execution(False):  # a scripted loss rounds otherwise once it is compiled
            (losses, weights), (ours, our_weights) = (
                five_steps(build(retinanet, kind), batch) for kind in (FCOS, dense.DistilledFCOS)
            )
        for expected, found in (*zip(losses, ours, strict=True), (weights, our_weights)):
            assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)

    def test_the_terms_are_sums_over_the_locations_divided_as_the_focal_loss_is(retinanet, batch, storage):
        teacher = build(retinanet, FCOS, seed=1).eval()
        options = {"loss": DKDLoss(temperature=1.0), "teacher": Teacher(teacher), "rows": "foreground"}
        model = build(retinanet, dense.DistilledFCOS, **options)
        images = model.preprocess_image(batch)
        logits = []
        with torch.no_grad():
            for detector in (model, teacher):
                features = [detector.backbone(images.tensor)[name] for name in detector.head_in_features]
                maps = detector.head(features)[0]
                logits.append(torch.cat([z.permute(0, 2, 3, 1).flatten(1, 2) for z in maps], 1).flatten(0, 1))
        labels, _ = model.label_anchors(model.anchor_generator(features), [x["instances"] for x in batch])
        labels = torch.cat(labels)
        kept = labels < 10
        losses = model(batch)
        loss = BinaryDKDLoss(1.0, 8.0, temperature=1.0, gamma=1.0, background_logit=False, validate=False)
        assert 0 < kept.sum() < len(labels)
        for term, mean in loss(logits[0][kept], logits[1][kept], labels[kept]).items():
            assert_close(losses[f"loss_kd_{term}"], mean * kept.sum() / model.loss_normalizer, rtol=1e-4, atol=1e-6)

    def test_inference_needs_no_teacher_and_gives_an_fcos_detections(retinanet, batch):
        def missing():
            raise AssertionError("a teacher was built")

        options = {"loss": DKDLoss(), "teacher": Teacher(missing)}
        with torch.no_grad():
            expected, found = (
                build(retinanet, kind, test_score_thresh=0.0, **more).eval()(batch)[0]["instances"]
                for kind, more in ((FCOS, {}), (dense.DistilledFCOS, options))
            )
        assert len(expected) > 0 and torch.equal(expected.pred_boxes.tensor, found.pred_boxes.tensor)

    def test_a_yaml_that_names_it_is_told_of_lazy_configs():
        cfg = kd_defaults()
        with pytest.raises(UserError, match="detectron2's FCOS has no yaml config"):
            dense.DistilledFCOS(cfg)
