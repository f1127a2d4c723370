import torch
import torch.nn.functional as F

from nanomimi.flat import FlatLM
from nanomimi.llama import LlamaConfig
from nanomimi.tokens import flatten
from tests.conftest import small_model
from tests.test_models import END, random_codes


def test_nats_are_the_joint_softmax_restricted_to_the_codebook_of_the_position():
    torch.manual_seed(0)
    model = small_model("flat", num_codebooks=3, max_frames=8)
    tokens = flatten(random_codes(2, 5), END)
    hidden = model.backbone(model.embedding(tokens))
    joint = hidden @ model.head.flatten(0, 1).T  # (B, N, Q * V)
    nats = model(tokens)
    for row in range(2):
        for n in range(3, 15):
            t, q = divmod(n, 3)
            own = joint[row, n - 1, q * 8 : q * 8 + 8]
            expected = F.cross_entropy(own, tokens[row, n] % 8)
            torch.testing.assert_close(nats[row, t - 1, q], expected)


def test_tied_and_untied_heads_have_the_same_shape():
    config = LlamaConfig(1, 2, 2, 16, 16)
    tied, untied = (FlatLM(config, 3, 7, 8, tied=t) for t in (True, False))
    assert tied.head.shape == untied.head.shape == (3, 8, 16)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(untied) - count(tied) == 3 * 8 * 16
    tied(flatten(random_codes(1, 3), END)).sum().backward()
    assert tied.embedding.weight.grad is not None
