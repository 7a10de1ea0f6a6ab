import pytest
import torch

from tests.helpers import random_image, tiny_segmenter
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import vit_config
from tokenexit.heads import build_head
from tokenexit.methods import Dense, DToP
from tokenexit.outputs.ledger import dense_gmacs, dtop_convention_gmacs

DTOP_BASELINES = [
    pytest.param("vit_base_patch16", 150, None, 512, 109.86, id="ADE20K-B"),
    pytest.param("vit_large_patch16", 150, None, 640, 616.98, id="ADE20K-L"),
    pytest.param("vit_large_patch16", 59, 16, 480, 315.36, id="PascalContext-L"),
    pytest.param("vit_large_patch16", 171, 16, 512, 366.86, id="COCO-Stuff-L"),
]


@pytest.mark.parametrize(("backbone", "classes", "heads", "side", "printed"), DTOP_BASELINES)
def test_dtop_convention__reproduces_the_papers_dense_baselines(backbone, classes, heads, side, printed):
    config = vit_config(backbone, class_token=False, final_norm=False)
    with torch.device("meta"):
        vit = ViT(config)
        head = build_head({"kind": "atm", "num_heads": heads}, config.embed_dim, classes)
    assert round(dtop_convention_gmacs(vit, head, (side, side)), 2) == printed


def test_dense_gmacs__knows_both_conventions():
    dtop = dense_gmacs("vit_base_patch16", "atm", 150, (512, 512), "dtop")
    assert dtop["gmacs"] == 109.86
    assert dtop["tokens"] == 1024
    own = dense_gmacs("vit_base_patch16", "fcn", 19, (512, 512), "tokenexit")
    n, d = 1025, 768
    head = 1024 * (d * 256 + 256 * 19)
    assert own["gmacs"] == round((1024 * d * d + 12 * (12 * n * d * d + 2 * n * n * d) + head) / 1e9, 2)


def test_ledger__counts_live_patches_by_block_and_adds_up_its_parts():
    model = tiny_segmenter("linear")
    with torch.no_grad():
        ledger = model([random_image(16, 20), random_image(8, 8)], DToP(0.0, keep_per_class=0)).ledger
    assert ledger.live == ((20, 0, 0, 0), (4, 0, 0, 0))
    assert ledger.tokens == (20, 4)
    d, hidden, patch, classes = 32, 64, 4, 5

    def block(n):
        return n * (4 * d * d + 2 * d * hidden) + 2 * n * n * d

    for part, n in zip(ledger.parts, ledger.tokens):
        assert part.embed == n * 3 * patch * patch * d
        assert part.blocks == block(n + 1) + 3 * block(1)
        assert part.exit_heads == n * d * classes
        assert part.decode_head == 0
        assert part.total == part.embed + part.blocks + part.exit_heads
    assert ledger.gmacs == tuple(part.total / 1e9 for part in ledger.parts)
    assert ledger.dense_macs == tuple(
        n * 3 * patch * patch * d + 4 * block(n + 1) + n * d * classes for n in ledger.tokens
    )
    assert ledger.share_of_dense == tuple(a / b for a, b in zip(ledger.macs, ledger.dense_macs))


def test_ledger__dense_is_its_own_denominator_unless_exits_are_recorded():
    model, images = tiny_segmenter("fcn"), [random_image(16, 20), random_image(8, 8)]
    with torch.no_grad():
        plain, recorded = model(images, Dense()).ledger, model(images, Dense(), with_records=True).ledger
    assert plain.share_of_dense == (1.0, 1.0)
    assert all(share > 1.0 for share in recorded.share_of_dense)
    assert plain.dense_macs == recorded.dense_macs


def test_ledger__indexing_gives_that_of_one_image():
    model = tiny_segmenter("fcn")
    with torch.no_grad():
        ledger = model([random_image(16, 20), random_image(8, 8)], DToP(0.5)).ledger
    assert ledger[1].macs == (ledger.macs[1],)
    assert ledger[1].live == (ledger.live[1],)
