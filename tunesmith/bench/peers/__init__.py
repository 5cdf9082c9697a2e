"""The same training step by tunesmith and by other libraries, side by side on one machine.

One row is one recipe. `prepare` decides it once (autos, token ids, learning rates, adapter targets); then tunesmith and
every peer train it, each in a process of its own, round after round (A B C A B C), on the same weights, the same
adapter initialisation, the same token ids and the same optimiser. A runner is a module of this package that takes a job
as JSON on stdin and says JSON lines on stdout; it is the only place where its library is imported.

Random weights are the same numbers in every runner: they are drawn on the device, tensor by tensor, in the order in
which tunesmith draws its own. Their loss sits at ln(vocabulary): rows on them show speed and memory, not quality.
"""
