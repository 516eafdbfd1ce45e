"""How close cbq is to what the hardware allows: ratios from one run. `python -m benchmarks --help`.

They import cbq; cbq never imports them. One module a question:

    steps      a window step against the bare forward and backward, and against a plain torch loop
    fusion     weight fake-quantization as installed against the plain autograd chain of `reference`
    growth     fitted exponents over blocks, segments, tokens, epochs, window, overlap, width
    memory     peak memory against its formula, each in a fresh process (`probe`)
    phases     a whole run on pico, and where its time goes
"""
