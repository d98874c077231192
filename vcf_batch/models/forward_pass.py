"""A forward pass that waits until one of its outputs is needed."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key")
Input = TypeVar("Input")
Output = TypeVar("Output")


class ForwardPass(Generic[Key, Input, Output]):
    """One forward pass over several inputs, made when the first output is asked for.

    Inputs of one pass change each other's last bits, so which inputs pass together must not depend on which outputs
    are needed. An output that nobody asks for costs nothing if the same holds for the others of its pass.

    Args:
        inputs: the inputs in order, by the key of their output. They are dropped once the pass is made.
        encode: the pass: a list of inputs to one output each, in the same order. It is not called for no input.
    """

    def __init__(self, inputs: Mapping[Key, Input], encode: Callable[[list[Input]], Iterable[Output]]) -> None:
        self._inputs, self._encode = dict(inputs), encode
        self._outputs: dict[Key, Output] = {}

    def __getitem__(self, key: Key) -> Output:
        """The output of one input."""
        self.make()
        return self._outputs[key]

    @property
    def waiting(self) -> Collection[Input]:
        """The inputs that are held; empty once the pass is made."""
        return self._inputs.values()

    def make(self) -> None:
        """Make the pass, if it is not made yet."""
        if self._inputs:
            self._outputs = dict(zip(self._inputs, self._encode([*self._inputs.values()]), strict=True))
            self._inputs = {}


def outputs(passes: Mapping[Key, ForwardPass[Key, Input, Output]]) -> dict[Key, Output]:
    """The output of each key.

    Args:
        passes: the pass of each key; keys may share one.
    """
    return {key: own[key] for key, own in passes.items()}
