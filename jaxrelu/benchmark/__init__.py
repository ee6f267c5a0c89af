"""What jaxrelu gains: memory, time and start-up time, beside those of its peers.

A peer is what an activation is compared with: jax.nn's or Flax's activation, PyTorch's, or a plain copy of the array. The
peer lean is jax.nn's or Flax's activation with the loss under `jaxrelu.memory.lean`; on a TPU, where that is the loss
itself, it is left out.

    python -m jaxrelu.benchmark --quick
    python -m jaxrelu.benchmark --json cpu.jsonl --plot memory.png
    python -m jaxrelu.benchmark --platform h200 --compile-only --json h200.jsonl
    python -m jaxrelu.benchmark --from cpu.jsonl h200.jsonl --plot memory.png
    python -m jaxrelu.benchmark --from cpu.jsonl h200.jsonl --ratios

Each line of the JSON file is one measurement. Its field `what` is one of these:

    memory      temporary bytes that the compiler plans for a gradient or a training step of the network `network`. `kernels`
                counts, by name, the calls of libraries and the matrix products that the compiler generated itself
    peak        the bytes that one run of the same adds to the device's peak memory, without its results, in a process of its
                own; on the CPU, those that it adds to the process's peak resident memory. `peak_bytes` is the peak itself
    saved       the bytes that PyTorch saves for the backward pass of the mlp
    forward     an elementwise call; the peer copy is NumPy's on the CPU, and the device's elsewhere
    gradient    the forward call and its gradient, for a given gradient of the output
    inplace     a call of `jaxrelu.inplace`
    expm1, exp  elu, and its derivative times a gradient, by jaxrelu's polynomial on every platform and by jnp's functions
    eager       a call outside jit
    step        an Adam step of the network `network`, which may be any but linen and nnx
    observed    Adam steps of an mlp, under `diagnostics.observe` in each (1/1: the time of one step) or in one of 20 (1/20:
                the time of 20 steps). The peer step is the same number of steps without observe
    resident    the growth of the peak resident memory by one step of a 12-layer mlp, in a process of its own
    import      `import jaxrelu` and `import jax`, each in a process of its own

Some networks are dense: mlp, residual, blocks (each layer jitted by itself), checkpoint (each layer under jax.checkpoint),
scan, vmapped (over the examples), transformer, gelu (an mlp with jax.nn.gelu, whatever the activation) and autoencoder.
Others are convolutional: conv, conv_norm, resnet18, mobilenet and unet.
linen and nnx are training steps in Flax. `jaxrelu.benchmark.networks.build` says what batch, width and layers mean for each.

A measurement has either `median_s` and `spread` (the interquartile range), both in seconds, or `temp_bytes`. The activation
is null where there is none: for the import, and for the peer identity, which is the same network without activations; its
memory is called the floor. elu_output is `elu(save="output")`. The peer whose name ends in +checkpoint has every layer under
`jax.checkpoint(dots_saveable)`.
"""

__all__: list[str] = []
