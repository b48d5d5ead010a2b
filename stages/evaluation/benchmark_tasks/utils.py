"""The functions that the YAML files of this folder name: the harness looks for them in a file beside these."""

from stages.evaluation.benchmark_scoring import checkable, humaneval_results, math_results, mbpp_results

__all__ = ["checkable", "humaneval_results", "math_results", "mbpp_results"]
