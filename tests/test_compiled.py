"""Counts of kernels, bytes and products in compiled programs, on programs whose counts are known; and budgets."""

# ruff: noqa: E501  # lines of programs as compilers print them

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.compiled.communication import bytes_sent, collectives, group_size
from benchmarks.compiled.program import Peak, Program, Shape, parse_instruction, shapes

ROOT = Path(__file__).parents[1]


def program(text):
    return Program(textwrap.dedent(text))


def test_a_matrix_product_reads_both_operands_and_writes_the_result():
    p = program(
        """
        ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> f32[64,16] {
          %a = bf16[64,32]{1,0} parameter(0)
          %b = bf16[32,16]{1,0} parameter(1)
          ROOT %dot = f32[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
        }
        """
    )
    counts = p.counts(Peak(1e3, {"bf16": 1e9}))
    assert (counts.bytes, counts.kernels) == (2 * 64 * 32 + 2 * 32 * 16 + 4 * 64 * 16, 1)
    assert counts.products == {"bf16": 2 * 64 * 32 * 16}
    assert counts.seconds == pytest.approx(counts.bytes / 1e3)
    assert p.counts(Peak(1e12, {"bf16": 10.0})).seconds == pytest.approx(2 * 64 * 32 * 16 / 10)


def test_an_operand_that_is_given_twice_is_read_once():
    p = program(
        """
        ENTRY %main (a: f32[64,32]) -> f32[64,64] {
          %a = f32[64,32]{1,0} parameter(0)
          ROOT %dot = f32[64,64]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}, operand_precision={highest,highest}
        }
        """
    )
    assert p.counts().bytes == 4 * (64 * 32 + 64 * 64)
    assert p.counts().products == {"f32 highest": 2 * 64 * 64 * 32}


def test_a_fusion_reads_its_operands_once_and_a_product_inside_it_is_counted():
    p = program(
        """
        %fused (p0: f32[100,10], p1: f32[10]) -> f32[100] {
          %p0 = f32[100,10]{1,0} parameter(0)
          %p1 = f32[10]{0} parameter(1)
          %b = f32[100,10]{1,0} broadcast(%p1), dimensions={1}
          %m = f32[100,10]{1,0} multiply(%p0, %b)
          %m2 = f32[100,10]{1,0} multiply(%m, %p0)
          ROOT %d = f32[100]{0} dot(%m2, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
        }

        ENTRY %main (a: f32[100,10], b: f32[10]) -> f32[100] {
          %a = f32[100,10]{1,0} parameter(0)
          %b = f32[10]{0} parameter(1)
          ROOT %f = f32[100]{0} fusion(%a, %b), kind=kInput, calls=%fused
        }
        """
    )
    assert p.counts().bytes == 4 * (1000 + 10 + 100)
    assert p.counts().kernels == 1
    assert p.counts().products == {"f32": 2 * 100 * 10}


LOOP = """
    %slice_of (p0: f32[8,100], p1: s32[]) -> f32[100] {
      %p0 = f32[8,100]{1,0} parameter(0)
      %p1 = s32[] parameter(1)
      %zero = s32[] constant(0)
      %s = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
      ROOT %r = f32[100]{0} bitcast(%s)
    }

    %put (p0: f32[8,100], p1: f32[100], p2: s32[]) -> f32[8,100] {
      %p0 = f32[8,100]{1,0} parameter(0)
      %p1 = f32[100]{0} parameter(1)
      %p2 = s32[] parameter(2)
      %zero = s32[] constant(0)
      %u = f32[1,100]{1,0} bitcast(%p1)
      ROOT %d = f32[8,100]{1,0} dynamic-update-slice(%p0, %u, %p2, %zero)
    }

    %body (t: (s32[], f32[8,100], f32[8,100])) -> (s32[], f32[8,100], f32[8,100]) {
      %t = (s32[], f32[8,100]{1,0}, f32[8,100]{1,0}) parameter(0)
      %i = s32[] get-tuple-element(%t), index=0
      %x = f32[8,100]{1,0} get-tuple-element(%t), index=1
      %y = f32[8,100]{1,0} get-tuple-element(%t), index=2
      %row = f32[100]{0} fusion(%x, %i), kind=kLoop, calls=%slice_of
      %new = f32[8,100]{1,0} fusion(%y, %row, %i), kind=kLoop, calls=%put
      ROOT %out = (s32[], f32[8,100]{1,0}, f32[8,100]{1,0}) tuple(%i, %x, %new)
    }

    %condition (t: (s32[], f32[8,100], f32[8,100])) -> pred[] {
      %t.1 = (s32[], f32[8,100]{1,0}, f32[8,100]{1,0}) parameter(0)
      ROOT %true = pred[] constant(true)
    }

    ENTRY %main (x: f32[8,100]) -> (s32[], f32[8,100], f32[8,100]) {
      %x.1 = f32[8,100]{1,0} parameter(0)
      %start = s32[] constant(0)
      %first = (s32[], f32[8,100]{1,0}, f32[8,100]{1,0}) tuple(%start, %x.1, %x.1)
      ROOT %w = (s32[], f32[8,100]{1,0}, f32[8,100]{1,0}) while(%first), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"8"}}
    }
    """


def test_a_gather_after_elementwise_operations_reads_what_it_gathers():
    text = """
        %fused (p0: bf16[8,1000], p1: s32[4]) -> f32[4,8] {{
          %p0 = bf16[8,1000]{{1,0}} parameter(0)
          %p1 = s32[4]{{0}} parameter(1)
          %wide = f32[8,1000]{{1,0}} convert(%p0)
          %twice = f32[8,1000]{{1,0}} add(%wide, %wide)
          {root}%few = f32[4,8]{{1,0}} gather(%twice, %p1), offset_dims={{1}}, collapsed_slice_dims={{1}}, start_index_map={{1}}, index_vector_dim=1, slice_sizes={{8,1}}
          {other}
        }}

        ENTRY %main (a: bf16[8,1000], i: s32[4]) -> f32[4,8] {{
          %a = bf16[8,1000]{{1,0}} parameter(0)
          %i = s32[4]{{0}} parameter(1)
          ROOT %f = {type} fusion(%a, %i), kind=kLoop, calls=%fused
        }}
        """
    few = text.format(root="ROOT ", other="", type="f32[4,8]{1,0}")
    assert program(few).counts().bytes == 2 * 4 * 8 + 4 * 4 + 4 * 4 * 8
    both = "ROOT %both = (f32[4,8]{1,0}, f32[8,1000]{1,0}) tuple(%few, %twice)"
    all_of_it = text.format(root="", other=both, type="(f32[4,8]{1,0}, f32[8,1000]{1,0})")
    assert program(all_of_it).counts().bytes == 2 * 8000 + 4 * 4 + 4 * 4 * 8 + 4 * 8000


@pytest.mark.parametrize("root", ["parameter", "bitcast"])
def test_a_nested_fusion_that_returns_its_operand_reads_it(root):
    body = {
        "parameter": "ROOT %q0 = f32[64,32]{1,0} parameter(0)",
        "bitcast": "%q0 = f32[64,32]{1,0} parameter(0)\n          ROOT %r = f32[64,32]{1,0} bitcast(%q0)",
    }[root]
    p = program(
        f"""
        %same (q0: f32[64,32]) -> f32[64,32] {{
          {body}
        }}

        %fused (p0: f32[64,32], p1: f32[32,16]) -> f32[64,16] {{
          %p0 = f32[64,32]{{1,0}} parameter(0)
          %p1 = f32[32,16]{{1,0}} parameter(1)
          %again = f32[64,32]{{1,0}} fusion(%p0), kind=kLoop, calls=%same
          ROOT %dot = f32[64,16]{{1,0}} dot(%again, %p1), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
        }}

        ENTRY %main (a: f32[64,32], b: f32[32,16]) -> f32[64,16] {{
          %a = f32[64,32]{{1,0}} parameter(0)
          %b = f32[32,16]{{1,0}} parameter(1)
          ROOT %f = f32[64,16]{{1,0}} fusion(%a, %b), kind=kOutput, calls=%fused
        }}
        """
    )
    assert p.counts().bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)


def test_an_asynchronous_slice_reads_the_slice():
    p = program(
        """
        ENTRY %main (a: f32[64,64]) -> f32[64,16] {
          %a = f32[64,64]{0,1:T(8,128)} parameter(0)
          %start = ((f32[64,64]{0,1:T(8,128)}), f32[64,16]{0,1:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:64], [0:16]}
          ROOT %done = f32[64,16]{0,1:T(8,128)S(1)} slice-done(%start)
        }
        """
    )
    assert p.counts().bytes == 4 * 64 * 16  # the result is on the chip


def test_a_loop_counts_once_per_iteration_and_a_slice_by_what_is_read_or_written():
    counts = program(LOOP).counts()
    assert counts.kernels == 16
    read, written = 4 * 100 + 4, 4 * 100  # a fusion reads a row and its index, and writes the row
    assert counts.bytes == 8 * ((read + written) + (4 * 100 + 4 + written))


def test_a_loop_with_an_unknown_trip_count_is_an_error():
    with pytest.raises(ValueError, match="how often the loop w runs"):
        program(LOOP.replace("known_trip_count", "something")).counts()


def test_a_loop_that_the_compiler_does_not_annotate_is_counted_by_its_condition():
    text = LOOP.replace(', backend_config={"known_trip_count":{"n":"8"}}', "").replace(
        "ROOT %true = pred[] constant(true)",
        "%i.1 = s32[] get-tuple-element(%t.1), index=0\n      %n = s32[] constant(8)\n"
        "      ROOT %lt = pred[] compare(%i.1, %n), direction=LT",
    )
    for step, trips in ((1, 8), (3, 3)):  # a loop that the compiler unrolls three times adds 3
        added = f"%step = s32[] constant({step})\n      %next = s32[] add(%i, %step)\n      ROOT %out"
        counted = text.replace("ROOT %out", added).replace("tuple(%i,", "tuple(%next,")
        counts = program(counted).counts()
        assert counts.kernels == trips * (2 + 1 + 1)  # with the addition, and each evaluation of the condition
    with pytest.raises(ValueError, match="how often the loop w runs"):
        program(text).counts()


def test_what_a_device_sends_is_that_of_ring_algorithms():
    p = program(
        """
        %started (a: f32[8]) -> (f32[8], f32[32]) {
          %a.1 = f32[8]{0} parameter(0)
          %all-gather.1 = f32[32]{0} all-gather(%a.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
          ROOT %start = (f32[8]{0}, f32[32]{0}) custom-call(%a.1, %all-gather.1), custom_call_target="AsyncCollectiveStart"
        }

        %finished (b: f32[8]) -> f32[32] {
          %b = f32[8]{0} parameter(0)
          %all-gather.2 = f32[32]{0} all-gather(%b), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
          ROOT %done = f32[32]{0} custom-call(%b, %all-gather.2), custom_call_target="AsyncCollectiveDone"
        }

        ENTRY %main (a: f32[8]) -> f32[32] {
          %a = f32[8]{0} parameter(0)
          %f = (f32[8]{0}, f32[32]{0}) fusion(%a), kind=kCustom, calls=%started
          %g = f32[32]{0} fusion(%a), kind=kCustom, calls=%finished
          %s = bf16[2]{0} reduce-scatter(%a), channel_id=8, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
          %c = f32[8]{0} collective-permute(%a), channel_id=9, source_target_pairs={{0,1},{1,0}}
          ROOT %r = f32[32]{0} all-reduce(%g), channel_id=10, replica_groups=[1,4]<=[4], to_apply=%add
        }
        """
    )
    found = {c.kind: c.sent for c in collectives(p)}
    gathered, scattered, permuted, reduced = 4 * 32 * 3 / 4, 2 * 8 * 3 / 4, 4 * 8, 2 * 4 * 32 * 3 / 4
    expected = {"all-gather": gathered, "reduce-scatter": scattered, "collective-permute": permuted}
    assert found == expected | {"all-reduce": reduced}
    assert bytes_sent(p) == sum(found.values())


def test_an_asynchronous_collective_that_runs_beside_an_inner_loop_counts_once():
    """Each iteration names the collective that goes on beside it, which starts before the loop."""
    p = program(
        """
        %started (a: f32[8]) -> (f32[8], f32[32]) {
          %a.1 = f32[8]{0} parameter(0)
          %all-gather.1 = f32[32]{0} all-gather(%a.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
          ROOT %start = (f32[8]{0}, f32[32]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
        }

        %going_on (b: f32[8]) -> f32[32] {
          %b = f32[8]{0} parameter(0)
          ROOT %all-gather.2 = f32[32]{0} all-gather(%b), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
        }

        %body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
          %t = (s32[], f32[8]{0}) parameter(0)
          %i = s32[] get-tuple-element(%t), index=0
          %x = f32[8]{0} get-tuple-element(%t), index=1
          %c = f32[8]{0} collective-permute(%x), channel_id=9, source_target_pairs={{0,1},{1,0}}
          %g = f32[32]{0} fusion(%x), kind=kCustom, calls=%going_on
          ROOT %out = (s32[], f32[8]{0}) tuple(%i, %c)
        }

        %condition (t: (s32[], f32[8])) -> pred[] {
          %t.1 = (s32[], f32[8]{0}) parameter(0)
          ROOT %true = pred[] constant(true)
        }

        ENTRY %main (a: f32[8]) -> (s32[], f32[8]) {
          %a = f32[8]{0} parameter(0)
          %f = (f32[8]{0}, f32[32]{0}) fusion(%a), kind=kCustom, calls=%started
          %start = s32[] constant(0)
          %first = (s32[], f32[8]{0}) tuple(%start, %a)
          ROOT %w = (s32[], f32[8]{0}) while(%first), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
        }
        """
    )
    assert {c.kind: c.times * c.sent for c in collectives(p)} == {
        "all-gather": 4 * 32 * 3 / 4,
        "collective-permute": 5 * 32,
    }


def test_the_size_of_a_group_is_read_from_every_form_that_compilers_print():
    assert group_size("replica_groups={{0,1},{2,3}}, dimensions={0}") == 2
    assert group_size("replica_groups=[2,4]<=[8], use_global_device_ids=true") == 4
    assert group_size("replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={1}") == 4


def test_a_conditional_counts_the_branch_that_moves_most():
    p = program(
        """
        %one (a: f32[10]) -> f32[10] {
          %a = f32[10]{0} parameter(0)
          ROOT %c = f32[10]{0} copy(%a)
        }

        %two (b: f32[10]) -> f32[10] {
          %b = f32[10]{0} parameter(0)
          %n = f32[10]{0} negate(%b)
          ROOT %d = f32[10]{0} copy(%n)
        }

        ENTRY %main (k: s32[], x: f32[10]) -> f32[10] {
          %k = s32[] parameter(0)
          %x = f32[10]{0} parameter(1)
          ROOT %r = f32[10]{0} conditional(%k, %x, %x), branch_computations={%one, %two}
        }
        """
    )
    assert (p.counts().kernels, p.counts().bytes) == (2, 4 * 40)


def test_tiles_are_counted_with_their_padding_and_on_chip_memory_is_not():
    (tiled,) = shapes("f32[3,5]{1,0:T(8,128)}")
    assert tiled == Shape("f32", (3, 5), (1, 0), (8, 128))
    assert tiled.bytes == 4 * 8 * 128
    (turned,) = shapes("bf16[300,1]{0,1:T(8,128)(2,1)}")
    assert turned.bytes == 2 * 8 * 384
    (near,) = shapes("f32[1024,1024]{1,0:T(8,128)S(1)}")
    assert (near.bytes, near.size) == (0, 2**20)
    copy = parse_instruction("  %c = f32[8,128]{1,0:T(8,128)S(1)} copy(%a), metadata={}")
    assert copy.operands == ("a",)
    assert copy.bytes == 0


def test_a_convolution_and_a_library_call_are_products():
    p = program(
        """
        ENTRY %main (x: bf16[8,28,28,16], k: bf16[3,3,16,32], a: f16[4,6], b: f16[6,2]) -> bf16[8,28,28,32] {
          %x = bf16[8,28,28,16]{3,2,1,0} parameter(0)
          %k = bf16[3,3,16,32]{3,2,1,0} parameter(1)
          %a = f16[4,6]{1,0} parameter(2)
          %b = f16[6,2]{1,0} parameter(3)
          %g = (f16[4,2]{1,0}, s8[1000]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
          ROOT %c = bf16[8,28,28,32]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
        }
        """
    )
    assert p.counts().products == {"f16": 2 * 4 * 2 * 6, "bf16": 2 * 8 * 28 * 28 * 32 * 9 * 16}
    gemm, conv = p.kernels()
    assert gemm.bytes == 2 * (24 + 12 + 8)  # without the workspace
    assert conv.bytes == 2 * (8 * 28 * 28 * 48 + 9 * 16 * 32)


def test_a_program_compiled_on_this_machine_is_parsed():
    text = jax.jit(lambda a, b: jnp.tanh(a @ b).sum()).lower(*[jnp.ones((64, 64))] * 2).compile().as_text()
    assert Program(text).counts().bytes >= 2 * 8 * 64 * 64


# --- Budgets: a few models as compiled for an H100 --------------------------------------------------------------------

SUPPORT = ROOT / "tests" / "support"


def has_cudnn():
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cudnn") is not None


def printed(script):
    """What a script that compiles for an H100 prints, in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=path)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs the extra aot-cuda")
@pytest.mark.skipif(not has_cudnn(), reason="needs nvidia-cudnn-cu12")
def test_attention_by_cudnn_runs_its_kernels_once_in_each_pass_and_stays_factored():
    found = printed(SUPPORT / "cudnn_attention.py")
    calls = {name: found[name]["calls"] for name in ("plain", "norms", "one pass", "two passes")}
    assert calls == {"plain": [1, 1], "norms": [1, 1], "one pass": [1, 1], "two passes": [2, 2]}  # forward, backward
    for name, memory in (("norms", 1.0), ("one pass", 1.4), ("two passes", 1.25)):
        assert found[name]["largest"] < found["batch of gradients"], found
        assert found[name]["memory"] <= memory * found["plain"]["memory"], found


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs the extra aot-cuda")
def test_programs_for_an_h100_keep_their_budgets():
    found = printed(SUPPORT / "budgets.py")
    block, mlp, conv = (found[name] for name in ("block", "mlp", "conv"))
    assert block["wide"] == 0, block
    assert block["bytes"] <= 1.6, block
    assert block["largest"] < block["batch of gradients"], block
    assert mlp["wide"] == 0, mlp
    assert mlp["bytes"] <= 1.4, mlp
    assert mlp["memory"] <= 1.1, mlp
    assert conv["kernels"] <= 2, conv
    assert conv["bytes"] <= 2, conv
    assert found["projected"] <= 1.2, found
    short, long = (found["deep"][T]["two_passes"] for T in ("128", "4096"))
    for row in found["deep"].values():  # 1.45 at T = 4,096 if the cotangents of the logits are held through the loop
        assert row["by_layer"]["memory"] <= 1.05, found
    assert short["memory"] <= 1.05, found  # 1.22 if the sums are selected from zeros that the loops start from
    assert short["bytes"] <= 2.25, found
    assert long["memory"] <= 1.05, found  # 1.35 as above
    assert long["bytes"] <= 2.0, found  # 2.18 with scaled copies of sides, and the attention mask repeated in memory
