"""What each leaf is, in models of the real libraries."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import line_of, readings_of, said, shapes, short
from flax import linen as nn
from flax import nnx

from optax_unitscale import Kernel, layers_of, stacked, unit_muon
from optax_unitscale.layers import layers_in

KEY = jax.random.key(0)


class Block(nnx.Module):
    """A block of a transformer, without what comes down again."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(24, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 24, decode=False, rngs=rngs)
        self.up = nnx.Linear(24, 32, rngs=rngs)


class ViT(nnx.Module):
    """Patches, a class token, positions, two blocks and a head."""

    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, 24, (4, 4), rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, 24)))
        self.pos = nnx.Param(jnp.zeros((1, 17, 24)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(24, 10, rngs=rngs)


class LinenViT(nn.Module):
    """The same."""

    @nn.compact
    def __call__(self, images):
        """Logits."""
        x = nn.Conv(24, (4, 4), 4, name="patches")(images).reshape(1, -1, 24)
        self.param("cls", nn.initializers.zeros, (1, 1, 24))
        x += self.param("pos", nn.initializers.zeros, (1, 4, 24))
        for i in range(2):
            x += nn.MultiHeadAttention(3, name=f"attention_{i}")(nn.LayerNorm(name=f"norm_{i}")(x))
            x = nn.Dense(24, name=f"up_{i}")(x)
        return nn.Dense(10, name="head")(x)


ATTENTION = dict.fromkeys(("query", "key", "value"), "0 > 1 2") | {"out": "0 1 > 2"}


def test_flax_vits_are_known_by_types_and_by_names():
    model = nnx.eval_shape(lambda: ViT(nnx.Rngs(0)))
    expected = {"pos": "embedding", "patches/kernel": "0 1 2 > 3", "head/kernel": "0 > 1"}
    in_nnx, in_linen = {}, {}
    for i in range(2):
        in_nnx |= {f"blocks/{i}/attention/{name}/kernel": ATTENTION[name] for name in ATTENTION}
        in_nnx[f"blocks/{i}/up/kernel"] = in_linen[f"up_{i}/kernel"] = "0 > 1"
        in_linen |= {f"attention_{i}/{name}/kernel": ATTENTION[name] for name in ATTENTION}
    assert said(model, {"pos": "embedding"}) == expected | in_nnx
    assert said(nnx.state(model, nnx.Param), {"pos": "embedding"}) == expected | in_nnx
    params = jax.eval_shape(LinenViT().init, KEY, jnp.zeros((1, 8, 8, 3)))
    assert said(params["params"], {"pos": "embedding"}) == expected | in_linen


class LinenBlock(nn.Module):
    """A block for nn.scan."""

    @nn.compact
    def __call__(self, x, _):
        """The carry, and no output."""
        return nn.Dense(8)(nn.LayerNorm()(nn.MultiHeadAttention(2, name="attention")(x))), None


def test_layers_stacked_by_linens_scan_are_refused_with_the_line_that_helps():
    scan = nn.scan(LinenBlock, {"params": 0}, split_rngs={"params": True}, length=2)
    params = jax.eval_shape(scan(name="blocks").init, KEY, jnp.zeros((1, 4, 8)), None)["params"]
    params = {"blocks": params, "tokens": shapes(embedding=(11, 8)), "head": shapes(kernel=(8, 11))}
    with pytest.raises(ValueError, match=r"do not show what they are:\n  blocks/Dense_0") as error:
        layers_of(params)
    assert line_of(error) == 'layers_of(params, stacked="blocks/**")'
    found = said(params, stacked="blocks/**")
    assert said(params, stacked=stacked("blocks/**")) == found
    # Two layers of two heads, so that biases are (2, 2, 4).
    assert found["blocks/attention/query/bias"] == "vector [0]"
    assert found["blocks/attention/query/kernel"] == "1 > 2 3 [0]"
    assert found["blocks/attention/out/kernel"] == "1 2 > 3 [0]"
    assert (found["blocks/Dense_0/kernel"], found["head/kernel"]) == ("1 > 2 [0]", "0 > 1")


def test_gates_of_nnxs_recurrent_cells_are_matrices_of_their_own():
    class Reader(nnx.Module):
        def __init__(self, rngs):
            self.gru = nnx.RNN(nnx.GRUCell(3, 5, rngs=rngs))
            self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(3, 5, rngs=rngs))
            self.simple = nnx.RNN(nnx.SimpleCell(3, 5, rngs=rngs))

    expected = {}
    for name, gates in {"gru": " *3", "lstm": " *4", "simple": ""}.items():
        for part in ("dense_i", "dense_h"):
            expected[f"{name}/cell/{part}/kernel"] = f"0 > 1{gates}"
    assert said(nnx.eval_shape(lambda: Reader(nnx.Rngs(0)))) == expected


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_stacked_by_nnxs_vmap_are_known_by_types(axis):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(axis_size=3, out_axes=axis)
    def make(rngs):
        return Block(rngs)

    found = said(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    assert found["up/kernel"] == ("1 > 2 [0]", "0 > 2 [1]")[axis]
    assert found["attention/query/kernel"] == ("1 > 2 3 [0]", "0 > 2 3 [1]")[axis]
    assert found["attention/out/kernel"] == ("1 2 > 3 [0]", "0 2 > 3 [1]")[axis]
    # Three layers of three heads: the bias is (3, 3, 8), and its kernel shows which axis is which.
    assert found["attention/query/bias"] == found["norm/scale"] == f"vector [{axis}]"


def test_a_layer_that_users_put_into_a_cell_has_no_gates():
    class Decoder(nnx.RNNCellBase):
        def __init__(self, rngs):
            self.hidden_features = 5
            self.cell = nnx.OptimizedLSTMCell(3, 5, rngs=rngs)
            self.head = nnx.Linear(5, 20, rngs=rngs)

    layers = layers_of(Decoder(nnx.Rngs(0)))
    assert layers["head/kernel"].blocks == 1
    assert layers["cell/dense_h/kernel"].blocks == 4


def test_stacks_of_one_leaf_get_a_line_to_copy_too():
    model = eqx.filter_vmap(lambda key: eqx.nn.Conv2d(3, 3, 3, key=key))(jax.random.split(KEY, 3))
    with pytest.raises(ValueError, match="Write") as error:
        layers_of(model)
    assert line_of(error) == 'layers_of(model, stacked={"weight": 0, "bias": 0})'
    assert layers_of(model, stacked={"weight": 0, "bias": 0})["weight"].batch == (0,)


def test_a_stack_as_high_as_it_is_wide_is_refused():
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, use_bias=False, key=key))
    model = {"blocks": [eqx.filter_eval_shape(make, jax.random.split(KEY, 4))] * 2}
    with pytest.raises(ValueError, match=r"blocks/0/weight \(4, 4, 4\)") as error:
        layers_of(model)
    assert line_of(error) == 'layers_of(model, stacked="blocks/**")'
    assert said(model, stacked="blocks/**")["blocks/1/weight"] == "2 > 1 [0]"


class EquinoxModel(eqx.Module):
    """Parts in a dict."""

    parts: dict[str, Any]
    step: int

    def __call__(self):
        """Callable, as models are."""


def equinox_model() -> EquinoxModel:
    convs = {
        "conv": eqx.nn.Conv2d(1, 8, 3, key=KEY),
        "depthwise": eqx.nn.Conv2d(8, 16, 3, groups=8, key=KEY),
        "up": eqx.nn.ConvTranspose1d(4, 3, 2, key=KEY),
    }
    parts = {
        "mlp": eqx.nn.MLP(3, 2, 4, 1, key=KEY),
        "gru": eqx.nn.GRUCell(3, 5, key=KEY),
        "lstm": eqx.nn.LSTMCell(3, 5, use_bias=False, key=KEY),
        "attention": eqx.nn.MultiheadAttention(2, 6, dropout_p=0.1, key=KEY),
        "tokens": eqx.nn.Embedding(7, 3, key=KEY),
        "norm": eqx.nn.LayerNorm((3, 4)),
        "gain": eqx.nn.Linear("scalar", 3, key=KEY),
    }
    return EquinoxModel({**convs, **parts}, 3)


@jax.tree_util.register_pytree_node_class
class Box:
    """A container that does not tell JAX the names of what is in it."""

    def __init__(self, *inside):
        self.inside = inside

    def tree_flatten(self):
        """What is in it, and nothing else."""
        return self.inside, None

    @classmethod
    def tree_unflatten(cls, _, inside):
        """The inverse."""
        return cls(*inside)


def test_in_a_container_without_names_a_leaf_is_asked_for():
    model = EquinoxModel({"box": Box(eqx.nn.Linear(3, 5, key=KEY))}, 3)
    with pytest.raises(
        ValueError, match=r"do not show what they are:\n  parts/box/0/weight"
    ) as error:
        layers_of(model)
    assert "Kernel(inputs=1, outputs=0)" in str(error.value)
    found = layers_of(model, {"**/weight": Kernel(inputs=1, outputs=0)})
    assert short(found["parts/box/0/weight"]) == "1 > 0"


EQUINOX = {
    "conv/weight": "1 2 3 > 0",
    "depthwise/weight": "1 2 3 > 0 *8",
    "up/weight": "1 2 > 0",
    "mlp/layers/0/weight": "1 > 0",
    "mlp/layers/1/weight": "1 > 0",
    "gru/weight_ih": "1 > 0 *3",
    "gru/weight_hh": "1 > 0 *3",
    "lstm/weight_ih": "1 > 0 *4",
    "lstm/weight_hh": "1 > 0 *4",
    **{f"attention/{name}_proj/weight": "1 > 0" for name in ("query", "key", "value", "output")},
    "tokens/weight": "embedding",
    "gain/weight": "1 > 0",
}


def test_equinox_models_are_known_and_so_are_updates_of_their_types():
    model = jax.tree.map(
        lambda x: np.ones(x.shape, x.dtype) if hasattr(x, "shape") else x,
        eqx.filter_eval_shape(equinox_model),
    )
    assert said(model) == {f"parts/{name}": kind for name, kind in EQUINOX.items()}
    assert "parts/attention/dropout/p" not in layers_of(model)
    # Leaves that are not trained are None; inside jit the others are traced.
    matrices = eqx.filter(model, lambda x: eqx.is_inexact_array(x) and x.ndim == 2)
    found = {}

    def find(tree):
        found.update({path.name: short(layer) for path, _, layer in layers_in("f", None, tree)})
        return tree

    jax.jit(find).lower(matrices)
    assert found.items() > {"parts/gru/weight_hh": "1 > 0 *3", "parts/norm/bias": "vector"}.items()
    ensemble = eqx.filter_eval_shape(
        eqx.filter_vmap(lambda key: eqx.nn.GRUCell(3, 5, key=key)), jax.random.split(KEY, 2)
    )
    assert said(ensemble)["weight_hh"] == "2 > 1 [0] *3"


def test_names_of_flax_mean_nothing_in_an_equinox_module():
    class Own(eqx.Module):
        kernel: jax.Array

    with pytest.raises(ValueError, match=r"dense/kernel \(2, 3\)"):
        layers_of({"dense": Own(jnp.ones((2, 3)))})


def haiku_model(ids):
    x = hk.Embed(10, 8)(ids)
    y = hk.LayerNorm(-1, True, True)(x)
    x += hk.MultiHeadAttention(2, 4, w_init=hk.initializers.Constant(0))(y, y, y)
    x = hk.Conv1D(8, 3)(hk.nets.MLP([16, 8])(x))
    gru, lstm = hk.GRU(8), hk.LSTM(8)
    x, _ = gru(x[0], gru.initial_state(4))
    x, _ = lstm(x, lstm.initial_state(4))
    return hk.layer_stack(3, name="blocks")(lambda x: hk.Linear(8)(x))(x)


def test_haikus_layers_are_known():
    params = jax.eval_shape(hk.transform(haiku_model).init, KEY, jnp.zeros((1, 4), int))
    attention = ("query", "key", "value", "linear")
    assert said(params, stacked="blocks/**") == {
        "embed/embeddings": "embedding",
        **{f"multi_head_attention/{name}/w": "0 > 1" for name in attention},
        "mlp/~/linear_0/w": "0 > 1",
        "mlp/~/linear_1/w": "0 > 1",
        "conv1_d/w": "0 1 > 2",
        "gru/w_i": "0 > 1 *3",
        "gru/w_h": "0 > 1 *3",
        "lstm/linear/w": "0 > 1 *4",
        "blocks/linear/w": "1 > 2 [0]",
        "blocks/linear/b": "vector [0]",
    }


def test_the_gates_of_convolutional_cells_are_blocks():
    def of_haiku(x):
        cell = hk.Conv2DLSTM((8, 8), 4, 3)
        return cell(x, cell.initial_state(1))[0]

    x = jnp.ones((1, 8, 8, 1))  # One channel, which elsewhere may be a depthwise convolution.
    params = jax.eval_shape(hk.transform(of_haiku).init, KEY, x)
    names = ("input_to_hidden", "hidden_to_hidden")
    assert said(params) == {f"conv2_dlstm/{name}/w": "0 1 2 > 3 *4" for name in names}
    cell = nn.RNN(nn.ConvLSTMCell(4, (3, 3)))
    params = jax.eval_shape(cell.init, KEY, x[:, None])["params"]
    assert said(params) == {f"cell/{name}/kernel": "0 1 2 > 3 *4" for name in ("ih", "hh")}


class Tree(nnx.Module):
    """A model whose parameter is a tree."""

    def __init__(self):
        self.extra = nnx.Param({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})


def test_a_parameter_may_be_a_tree():
    model, layers = Tree(), layers_of(Tree())
    assert said(model) == {"extra/kernel": "0 > 1"}
    optimizer = nnx.Optimizer(model, unit_muon(0.1, layers=layers), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model.extra["kernel"] ** 2))(model))
    assert np.all(model.extra["kernel"] < 1)


def maxtext(layers: int) -> Any:
    """As MaxText names and stacks its parameters, with a key and a value for two queries each."""
    attention = {
        "query": shapes(kernel=(16, layers, 4, 8)),
        "key": shapes(kernel=(16, layers, 2, 8)),
        "value": shapes(kernel=(16, layers, 2, 8)),
        "out": shapes(kernel=(4, layers, 8, 16)),
    }
    mlp = {"wi": shapes(kernel=(16, layers, 32)), "wo": shapes(kernel=(32, layers, 16))}
    layers_ = {"attention": attention, "mlp": mlp, "norm": shapes(scale=(16, layers))}
    return {"decoder": {"layers": layers_}, "embedder": shapes(embedding=(11, 16))}


def test_layers_that_maxtext_stacks_along_axis_1_are_batches():
    with pytest.raises(ValueError, match="decoder/layers/norm/scale") as error:
        layers_of(maxtext(5))
    assert line_of(error) == 'layers_of(params, stacked={"decoder/**": 1})'
    found = said(maxtext(5), stacked={"decoder/layers/**": 1})
    for name in ("query", "key", "value"):
        assert found.pop(f"decoder/layers/attention/{name}/kernel") == "0 > 2 3 [1]"
    assert found == {
        "decoder/layers/attention/out/kernel": "0 2 > 3 [1]",
        "decoder/layers/mlp/wi/kernel": "0 > 2 [1]",
        "decoder/layers/mlp/wo/kernel": "0 > 2 [1]",
        "decoder/layers/norm/scale": "vector [1]",
        "embedder/embedding": "embedding",
    }


class Gemma(nnx.Module):
    """Kernels as Gemma has them."""

    def __init__(self, rngs: nnx.Rngs):
        self.kv = nnx.Einsum("BSD,CKDH->CBSKH", (2, 1, 16, 8), rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (4, 8, 16), (16,), rngs=rngs)
        self.experts = nnx.Einsum("BED,EDF->BEF", (3, 16, 32), rngs=rngs)
        self.gain = nnx.Einsum("BTD,D...->BTD...", (16, 4), rngs=rngs)


def test_einsums_are_read_by_their_equation_or_by_overrides():
    model = nnx.eval_shape(lambda: Gemma(nnx.Rngs(0)))
    expected = {"kv/kernel": "2 > 1 3 [0]", "out/kernel": "0 1 > 2"}
    expected["experts/kernel"] = "1 > 2 [0]"
    with pytest.raises(ValueError, match=r"are:\n  gain/kernel \(16, 4\)\n  kv/kernel") as error:
        layers_of(model)
    *gain, separate, one = readings_of(error)
    assert gain == [{"**/gain/kernel": Kernel(0, 1)}, {"**/gain/kernel": Kernel(1, 0)}]
    assert said(model, {"gain/*": "vector", **separate}) == expected
    assert said(model, {"gain/*": "vector", **one}) == expected | {"kv/kernel": "2 > 0 1 3"}
    params = {"kv_einsum": shapes(w=(2, 1, 16, 8)), "mlp": shapes(gating_einsum=(2, 16, 32))}
    with pytest.raises(ValueError, match=r"kv_einsum/w .*\n  mlp/gating_einsum"):
        layers_of(params)
    # The key and the value, the gate and the value, each by itself.
    overrides = {"**/kv_einsum/w": Kernel(-2, (1, 3)), "**/gating_einsum": Kernel(1, 2)}
    found = said({"layer_0": params}, overrides)
    assert list(found.values()) == ["2 > 1 3 [0]", "1 > 2 [0]"]


def test_pairs_of_lora_are_kernels_of_nnx_and_of_qwix():
    model = nnx.eval_shape(lambda: nnx.LoRALinear(6, 4, lora_rank=2, rngs=nnx.Rngs(0)))
    pair = {"lora/lora_a": "0 > 1", "lora/lora_b": "0 > 1"}
    assert said(model) == {"kernel": "0 > 1", **pair}
    assert said(nnx.state(model, nnx.LoRAParam)) == pair
    pairs = {
        "dense": shapes(kernel_lora_a=(16, 2), kernel_lora_b=(2, 16)),
        "query": shapes(w_lora_a=(16, 2), w_lora_b=(2, 4, 8)),
        "out": shapes(w_lora_a=(4, 8, 2), w_lora_b=(2, 16)),
    }
    assert list(said(pairs).values()) == ["0 > 1", "0 > 1", "0 1 > 2", "0 > 1", "0 > 1", "0 > 1 2"]
    with pytest.raises(ValueError, match=r"blocks/lora_a .*\n  blocks/lora_b"):
        layers_of({"blocks": shapes(lora_a=(2, 16, 2), lora_b=(2, 2, 16))})
    # Where the other one is not trained, nothing shows that they are stacked.
    with pytest.raises(ValueError, match=r"show what they are:\n  blocks/lora_b"):
        layers_of({"blocks": shapes(lora_b=(2, 2, 16))})


def test_an_axis_of_layers_is_not_taken_for_one_of_space():
    known = {"conv": shapes(kernel=(3, 3, 3, 8, 8)), "conv_1": shapes(kernel=(1, 7, 8, 8))}
    assert list(said(known).values()) == ["0 1 2 3 > 4", "0 1 2 > 3"]
    for module in ("Conv_0", "conv1_d"):
        with pytest.raises(ValueError, match=rf"show what they are:\n  {module}/kernel"):
            layers_of({module: shapes(kernel=(5, 3, 3, 8, 8))})


def test_the_line_to_copy_is_the_likely_one():
    for name, shape, kind in (
        ("Conv_0/kernel", (3, 3, 1, 32), Kernel((0, 1, 2), 3)),
        ("depthwise/kernel", (3, 3, 1, 32), Kernel((0, 1, 2), 3, 32)),
        ("moe/w_in", (4, 8, 16), Kernel(1, 2)),
        ("w_in", (4, 8, 16), Kernel(0, (1, 2))),
    ):
        with pytest.raises(ValueError, match="keep the line that is right") as error:
            layers_of({name: np.ones(shape, np.float32)})
        assert [*readings_of(error)[0].values()] == [kind]


def test_what_undoes_an_embedding_is_asked_for_the_kernel_first():
    assert list(said(shapes(pos_embedding=(4, 8))).values()) == ["embedding"]
    with pytest.raises(ValueError, match=r"show what they are:\n  unembedding") as error:
        layers_of(shapes(unembedding=(8, 100)))
    assert [*readings_of(error)[0].values()] == [Kernel(0, 1)]


def test_depthwise_convolutions_are_known_by_types_and_refused_by_names():
    def make():
        rngs = nnx.Rngs(0)
        deep = nnx.Conv(512, 512, (3, 3), feature_group_count=512, rngs=rngs)
        wide = nnx.Conv(512, 8, (1, 1), rngs=rngs)
        up = nnx.ConvTranspose(8, 4, (2,), transpose_kernel=True, rngs=rngs)
        return nnx.Sequential(deep, wide, up)

    model = nnx.eval_shape(make)
    layers = layers_of(model)
    assert short(layers["layers/0/kernel"]) == "0 1 2 > 3 *512"
    # Each output sees 3 times 3 inputs.
    assert layers["layers/0/kernel"].fans((3, 3, 1, 512)) == (9, 1)
    assert short(layers["layers/2/kernel"]) == "0 2 > 1"
    params = {n: {"dw": shapes(kernel=(3, 3, 1, n), bias=(n,))} for n in (8, 512)}
    with pytest.raises(
        ValueError, match=r"keep the line that is right:\n  .*, {2}# depthwise"
    ) as error:
        layers_of(params)
    # A name for each, for they differ in their blocks.
    deep8, one8, deep512, one512 = readings_of(error)
    assert said(params, deep8 | one512) == {
        "8/dw/kernel": "0 1 2 > 3 *8",
        "512/dw/kernel": "0 1 2 > 3",
    }
    assert said(params, one8 | deep512)["512/dw/kernel"] == "0 1 2 > 3 *512"


def haiku_linears(names):
    net = hk.transform(lambda x: [hk.Linear(24, name=name)(x) for name in names])
    return net.init(KEY, jnp.ones((1, 8)))


LINEARS: dict[str, Any] = {
    "nnx": lambda names: nnx.Dict({n: nnx.Linear(8, 24, rngs=nnx.Rngs(0)) for n in names}),
    "linen": lambda names: {n: nn.Dense(24).init(KEY, jnp.ones((1, 8)))["params"] for n in names},
    "equinox": lambda names: {n: eqx.nn.Linear(8, 24, key=KEY) for n in names},
    "haiku": haiku_linears,
}
LEAVES = {"equinox": ("weight", "1 > 0"), "haiku": ("w", "0 > 1")}


@pytest.mark.parametrize("library", LINEARS)
@pytest.mark.parametrize("name", ["qkv", "c_attn", "in_proj", "query_key_value", "Wqkv"])
def test_fused_projections_are_refused_with_a_line_for_each_reading(name, library):
    model = LINEARS[library]([name, "up"])
    leaf, axes = LEAVES.get(library, ("kernel", "0 > 1"))
    with pytest.raises(
        ValueError, match=rf"what they are:\n  {name}/{leaf} \S+ \S+\nWrite"
    ) as error:
        layers_of(model)
    separate, one = readings_of(error)
    assert said(model, separate) == {f"{name}/{leaf}": f"{axes} *3", f"up/{leaf}": axes}
    assert said(model, one) == {f"{name}/{leaf}": axes, f"up/{leaf}": axes}


def test_fused_projections_in_a_stack_are_refused_by_the_axes_of_the_whole_leaf():
    params = {"blocks": {"qkv": shapes(kernel=(5, 8, 24), bias=(5, 24))}}
    with pytest.raises(ValueError, match="qkv/kernel") as error:
        layers_of(params)
    line = '{"**/qkv/kernel": Kernel(inputs=1, outputs=2, blocks=3)}, stacked="blocks/**"'
    assert line_of(error) == f"layers_of(params, {line})"

    @nnx.split_rngs(splits=5)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(8, 24, rngs=rngs)

    model = nnx.Dict(qkv=make(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="qkv/kernel") as error:
        layers_of(model)
    assert line_of(error) == f"layers_of(model, {line.partition('}')[0]}}})"


def test_where_queries_share_keys_one_kernel_comes_first():
    with pytest.raises(ValueError, match="qkv/kernel") as error:
        layers_of({"qkv": shapes(kernel=(64, 96))})  # 64 + 16 + 16.
    one, _ = readings_of(error)
    assert one == {"**/qkv/kernel": Kernel(0, 1)}


def test_widths_tell_what_is_fused_where_names_do_not():
    # Mamba's in_proj; a key and a value of other widths; GPT-2's in Hugging Face's Flax, (out, in).
    params = {"in_proj": shapes(kernel=(9, 36)), "kv": shapes(kernel=(8, 5))}
    assert said(params) == {"in_proj/kernel": "0 > 1", "kv/kernel": "0 > 1"}
    with pytest.raises(ValueError, match="c_attn/kernel") as error:
        layers_of({"c_attn": shapes(kernel=(24, 8))})
    separate, _ = readings_of(error)
    assert said({"c_attn": shapes(kernel=(24, 8))}, separate) == {"c_attn/kernel": "1 > 0 *3"}


def test_kerass_gru_is_known_by_its_names_and_its_depthwise_kernels_are_refused():
    cell = shapes(kernel=(8, 48), recurrent_kernel=(16, 48), bias=(2, 48))
    gates = {"gru_cell/kernel": "0 > 1 *3", "gru_cell/recurrent_kernel": "0 > 1 *3"}
    assert said({"gru_cell": cell}) == gates
    params = {"depthwise_conv2d": shapes(kernel=(3, 3, 8, 2), bias=(16,))}
    with pytest.raises(ValueError, match="as in Keras") as error:
        layers_of(params)
    each, ordinary = readings_of(error)
    assert said(params, each) == {"depthwise_conv2d/kernel": "0 1 > 3 [2]"}
    assert said(params, ordinary) == {"depthwise_conv2d/kernel": "0 1 2 > 3"}


def test_a_tied_embedding_is_an_embedding_until_users_say_otherwise():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.tokens = nnx.Embed(11, 8, rngs=rngs)
            self.head = self.tokens

    model = nnx.eval_shape(lambda: Tied(nnx.Rngs(0)))
    (name,) = nnx.state(model, nnx.Param)
    assert said(model) == {f"{name}/embedding": "embedding"}
    assert said(model, {"*/embedding": Kernel(1, 0)}) == {f"{name}/embedding": "1 > 0"}


def test_the_biases_of_experts_are_vectors_of_their_own():
    experts = nnx.LinearGeneral(3, 5, batch_axis={0: 4}, rngs=nnx.Rngs(0))
    by_name = nnx.Einsum("BED,EDF->BEF", (4, 3, 5), (4, 5), rngs=nnx.Rngs(0))
    for model in (experts, by_name):
        assert said(model) == {"kernel": "1 > 2 [0]", "bias": "vector [0]"}
