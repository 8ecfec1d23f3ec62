"""llama.cpp through its C API, from whichever Python package has brought it. Nothing is loaded on import.

:mod:`~quantkit.llama_cpp.packages` finds the shared library, :mod:`~quantkit.llama_cpp.library` loads it and speaks to
it, :mod:`~quantkit.llama_cpp.model` reads tokens with a GGUF file, and :mod:`~quantkit.llama_cpp.quantizer` quantizes
the rows of a matrix.
"""
