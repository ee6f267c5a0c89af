"""What jaxrelu gains: memory, time and start-up beside jax.nn, Flax, PyTorch and a plain copy.

    python -m jaxrelu.benchmark --quick
    python -m jaxrelu.benchmark --json cpu.jsonl --plot memory.png
    python -m jaxrelu.benchmark --platform h200 --compile-only --json h200.jsonl
    python -m jaxrelu.benchmark --from cpu.jsonl h200.jsonl --plot memory.png

A line of JSON is one measurement, of one of these (`what`):

    memory      temporary bytes of a compiled gradient or training step, of the network `network`; `kernels` counts the
                compiled calls of a library, and the products that the compiler generates itself, by name
    peak        what one run of the same adds to the device's peak memory, its results not counted, in a process of its own;
                on the CPU to the peak resident set. `peak_bytes` is the peak itself
    saved       bytes that PyTorch saves for the backward pass of the mlp
    forward     an elementwise call; the peer copy is NumPy's on the CPU, the device's elsewhere
    gradient    the same for a given gradient of the output, forward included
    inplace     `jaxrelu.inplace`
    expm1, exp  elu and its derivative times a gradient, by jaxrelu's polynomial on every platform, and by jnp's functions
    eager       a call outside jit
    step        an Adam step of the network `network`, any but linen and nnx
    observed    the same of an mlp under `diagnostics.observe` in every step (1/1) or in one of 20 (1/20, the time of 20
                steps), beside the peer step: as many without
    resident    growth of the peak resident set by one step of a 12-layer mlp, in a process of its own
    import      `import jaxrelu` and `import jax`, each in a process of its own

The networks are dense (mlp, residual, blocks jitted one by one, layers under jax.checkpoint, scan, vmapped over examples,
transformer), convolutional (conv, conv_norm, resnet18, mobilenet, unet) and steps of training in Flax (linen, nnx);
`jaxrelu.benchmark.networks.build` says what batch, width and layers mean for each.

A measurement comes with `median_s` and `spread` (interquartile range) in seconds, or with `temp_bytes`. The activation is
null for what has none: the floor of the memory (peer identity) and the import. elu_output is `elu(save="output")`. The peer
that ends in +checkpoint has every layer under `jax.checkpoint(dots_saveable)`.
"""

__all__: list[str] = []
