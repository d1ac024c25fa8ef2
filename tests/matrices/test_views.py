"""Views: where the rows, the columns and the blocks of a weight are, told entry by entry."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from snparam.matrices.views import Layout
from snparam.testing.tensors import FORMATS, in_memory

SIDES = st.integers(1, 4)
KERNELS = st.lists(st.integers(1, 3), max_size=3)


def numbered(shape, memory="contiguous"):
    """Every entry another number."""
    return in_memory(torch.arange(torch.Size(shape).numel()).float().reshape(shape), memory)


def rows_as_sets(stack):
    """Rows of all blocks in order; columns in any order, which no singular value depends on."""
    return [[sorted(row.tolist()) for row in block] for block in stack]


def split(rows, blocks):
    count = len(rows) // blocks
    return [rows[i * count : (i + 1) * count] for i in range(blocks)]


@st.composite
def rows_layouts(draw):
    blocks = draw(st.integers(1, 3))
    shape = (blocks * draw(SIDES), draw(SIDES), *draw(KERNELS))
    return shape, Layout("rows"), blocks


@given(case=rows_layouts(), memory=st.sampled_from(FORMATS))
def test_rows_are_the_first_dimension(case, memory):
    shape, layout, blocks = case
    weight = numbered(shape, memory)
    view = layout.view(shape, blocks)
    rows = [sorted(row.flatten().tolist()) for row in weight]
    assert rows_as_sets(view.to_matrices(weight)) == split(rows, blocks)
    assert view.matrices == (blocks, shape[0] // blocks, weight[0].numel())


@st.composite
def transposed_layouts(draw):
    groups = draw(st.integers(1, 4))
    inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = (groups * inputs, outputs, *draw(KERNELS))
    possible = [b for b in range(1, groups * outputs + 1) if (groups * outputs) % b == 0]
    aligned = [b for b in possible if b % groups == 0 or groups % b == 0]
    return shape, Layout("transposed_conv", groups=groups), draw(st.sampled_from(aligned))


@given(case=transposed_layouts(), memory=st.sampled_from(FORMATS))
def test_rows_of_a_transposed_convolution_are_its_output_channels_group_by_group(case, memory):
    shape, layout, blocks = case
    weight = numbered(shape, memory)
    inputs = shape[0] // layout.groups
    rows = [
        sorted(weight[group * inputs + i, output].flatten().tolist() for i in range(inputs))
        for group, output in itertools.product(range(layout.groups), range(shape[1]))
    ]
    rows = [sorted(itertools.chain(*row)) for row in rows]
    assert rows_as_sets(layout.view(shape, blocks).to_matrices(weight)) == split(rows, blocks)


@given(rows=SIDES, columns=SIDES, memory=st.sampled_from(FORMATS), blocks=st.integers(1, 3))
def test_rows_of_an_input_first_weight_are_its_second_dimension(rows, columns, memory, blocks):
    weight = numbered((columns, blocks * rows), memory)
    stack = Layout("columns").view(weight.shape, blocks).to_matrices(weight)
    expected = [[sorted(column) for column in part] for part in split(weight.T.tolist(), blocks)]
    assert rows_as_sets(stack) == expected


@given(experts=st.integers(2, 4), rows=SIDES, kernel=KERNELS, memory=st.sampled_from(FORMATS))
def test_a_bare_stack_has_one_block_for_each_expert(experts, rows, kernel, memory):
    weight = numbered((experts, rows, 2, *kernel), memory)
    stack = Layout("bare").view(weight.shape, experts).to_matrices(weight)
    expected = [[sorted(row.flatten().tolist()) for row in expert] for expert in weight]
    assert rows_as_sets(stack) == expected


ANY = st.one_of(
    rows_layouts(),
    transposed_layouts(),
    st.tuples(st.tuples(SIDES, SIDES), st.just(Layout("columns")), st.just(1)),
    st.tuples(st.tuples(st.just(3), SIDES, SIDES), st.just(Layout("bare")), st.just(3)),
)


CONVOLUTION = ((4, 3, 2, 2), Layout("rows"), 1)


@example(case=CONVOLUTION, memory="channels_last")
@given(case=ANY, memory=st.sampled_from(FORMATS))
def test_writing_back_is_the_inverse_of_reading(case, memory):
    shape, layout, blocks = case
    weight = numbered(shape, memory)
    view = layout.view(shape, blocks)
    assert view.to_matrices(weight).shape == view.matrices
    assert torch.equal(view.from_matrices(view.to_matrices(weight), like=weight), weight)


@example(case=CONVOLUTION, memory="channels_last", other="contiguous")
@example(case=CONVOLUTION, memory="contiguous", other="channels_last")
@given(case=ANY, memory=st.sampled_from(FORMATS), other=st.sampled_from(FORMATS))
def test_two_tensors_read_alike_pair_up_entry_by_entry(case, memory, other):
    """A gradient may lie in memory otherwise than its weight does."""
    shape, layout, blocks = case
    weight, gradient = numbered(shape, memory), numbered(shape, other)
    view = layout.view(shape, blocks)
    assert torch.equal(view.to_matrices(gradient, like=weight), view.to_matrices(weight))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3, 2, 2, 3)])
def test_usual_memory_formats_are_read_and_written_in_place(shape, memory):
    weight = numbered(shape, memory)
    view = Layout("rows").view(shape)
    stack = view.to_matrices(weight)
    assert stack.data_ptr() == weight.data_ptr()
    back = view.from_matrices(stack, like=weight)
    assert back.data_ptr() == weight.data_ptr()
    assert back.stride() == weight.stride()


@pytest.mark.parametrize("blocks", [0, 2, 6])
def test_rows_that_do_not_split_are_refused_with_both_numbers(blocks):
    with pytest.raises(ValueError, match=rf"5 rows.*blocks={blocks}"):
        Layout("rows").view((5, 3), blocks)
