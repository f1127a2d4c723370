import torch
import torch.nn.functional as F

from nanomimi.hierarchical import csm_depth
from nanomimi.llama import LlamaConfig
from nanomimi.tokens import flatten
from tests.conftest import small_model
from tests.test_models import END, random_codes


def test_a_frame_is_predicted_from_the_hidden_state_after_the_frame_before_it():
    """Written out: every code from state t - 1 and the codes before it in frame t."""
    torch.manual_seed(0)
    model = small_model("hierarchical", num_codebooks=3, max_frames=8)
    codes = random_codes(1, 5)
    embedded = model.embedding(flatten(codes, END))[0].view(5, 3, -1)  # (T, Q, C)
    states = model.backbone(embedded.sum(dim=1)[None])[0]
    nats = model(flatten(codes, END))[0]
    for t in range(1, 5):
        inside = torch.stack([states[t - 1], embedded[t, 0], embedded[t, 1]])
        hidden = model.depth(model.projection(inside)[None])[0]
        heads = model.backbone_head, *model.depth_head
        for q, seen in enumerate([states[t - 1], hidden[1], hidden[2]]):
            expected = F.cross_entropy(heads[q] @ seen, codes[0, q, t])
            torch.testing.assert_close(nats[t - 1, q], expected)


def test_no_gradient_flows_from_a_frame_into_the_state_that_predicts_it():
    torch.manual_seed(0)
    model = small_model("hierarchical", num_codebooks=3, max_frames=8)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    nats = model(flatten(random_codes(1, 6), END))
    for t in range(5):  # nats[:, t] are of frame t + 1, so frame t is the last that may help
        (gradient,) = torch.autograd.grad(nats[0, t].sum(), seen[0], retain_graph=True)
        flows = gradient[0].abs().sum(dim=1) > 0
        assert flows.tolist() == [frame <= t for frame in range(5)]


def test_with_one_codebook_it_is_the_flat_model():
    torch.manual_seed(0)
    flat, hierarchical = (small_model(arch, 1, 8) for arch in ("flat", "hierarchical"))
    names = {"lm_head": "backbone_head"}
    weights = {names.get(k, k): v for k, v in flat.state_dict().items()}
    weights["backbone_head"] = weights["backbone_head"][0]
    hierarchical.load_state_dict(weights)
    codes = torch.randint(0, END, (2, 1, 8))
    assert torch.equal(flat(flatten(codes, END)), hierarchical(flatten(codes, END)))
    greedy = lambda logits: logits.argmax(-1)
    a, b = (list(model.generate(codes, 12, greedy)) for model in (flat, hierarchical))
    assert torch.equal(torch.stack(a), torch.stack(b))


def test_the_depth_decoder_has_the_proportions_of_csm():
    backbone = LlamaConfig(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_hidden=8192)
    assert csm_depth(backbone) == LlamaConfig(4, 8, 2, 1024, 8192)
    assert csm_depth(backbone, n_layer=2, n_head=4) == LlamaConfig(2, 4, 1, 1024, 8192)


def test_in_training_the_depth_of_a_share_of_frames_stands_for_all():
    torch.manual_seed(0)
    options = {"depth_fraction": 0.25, "depth_n_head": 2}
    model = small_model("hierarchical", 3, 8, options=options)
    batches = [flatten(torch.randint(0, END, (4, 3, 9)), END) for _ in range(100)]
    drawn = []
    for tokens in batches:
        full, part = model.eval()(tokens).detach(), model.train()(tokens).detach()
        kept = part[..., 1] != 0  # (B, T)
        assert kept.sum() == 8 and torch.equal(part[..., 0], full[..., 0])
        torch.testing.assert_close(part[..., 1:], full[..., 1:] * 4 * kept[..., None])
        assert torch.equal(model(tokens), part)  # the batch decides, so a resumed run repeats it
        drawn.append(kept)
    assert torch.stack(drawn).any(dim=0).all()


def test_the_depth_decoder_computes_only_the_frames_it_is_trained_on():
    model = small_model("hierarchical", 3, 8, options={"depth_fraction": 0.01, "depth_n_head": 2})
    rows = []
    model.depth.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.train()(flatten(random_codes(2, 6), END))
    model.eval()(flatten(random_codes(2, 6), END))
    assert rows == [1, 10]
