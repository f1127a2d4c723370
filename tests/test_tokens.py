import pytest
import torch

from nanomimi.tokens import flatten, separator, unflatten


def test_the_worked_example_of_the_docstring():
    codes = torch.tensor([[[1, 3], [0, 2], [3, 1]]])
    assert flatten(codes, codebook_size=4).tolist() == [[1, 5, 13, 3, 7, 11]]


def test_unflatten_inverts_flatten_with_and_without_end():
    codes = torch.randint(0, 10, (2, 5, 7))  # 9 is END
    assert torch.equal(unflatten(flatten(codes, 9), 5, 9), codes)


def test_divmod_of_a_token_is_codebook_and_code():
    codes = torch.randint(0, 9, (1, 4, 6))
    q, code = flatten(codes, 9)[0] // 10, flatten(codes, 9)[0] % 10
    assert q.tolist() == [0, 1, 2, 3] * 6
    assert torch.equal(code.view(6, 4).T, codes[0])


def test_fewer_codebooks_are_a_slice_of_the_columns():
    codes = torch.randint(0, 9, (1, 8, 5))
    assert torch.equal(
        flatten(codes, 9).view(1, 5, 8)[:, :, :3].flatten(1), flatten(codes[:, :3], 9)
    )


def test_the_separator_is_one_frame_of_ends():
    assert separator(3, 9).tolist() == [[9], [9], [9]]


@pytest.mark.parametrize(
    "tokens", [torch.arange(5)[None], torch.tensor([[10, 0, 20]]), torch.tensor([[0, 10]])]
)
def test_tokens_off_the_frame_grid_are_refused(tokens):
    with pytest.raises(ValueError):
        unflatten(tokens, 3, 9)


@pytest.mark.parametrize(
    "codes", [torch.tensor([[[10]]]), torch.tensor([[[-1]]]), torch.zeros(2, 3).long()]
)
def test_codes_out_of_range_are_refused(codes):
    with pytest.raises(ValueError):
        flatten(codes, 9)
