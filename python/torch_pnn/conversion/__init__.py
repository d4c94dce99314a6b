"""The parts behind `torch_pnn.convert` and `torch_pnn.restore`, in the order in which a call meets them.

`rules` finds a model's convolutions and says which stay, and why; `trace` runs an example through a copy of the model
and reports what the rules need to know; `reads` looks for code that uses a convolution's weight by itself; `swap` makes
the replacements and puts them in place; `record` is the table that the caller gets.
"""
