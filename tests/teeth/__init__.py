"""Shows that the tests bite: breaks the shipped code in one way at a time, and sees the tests fail.

python -m tests.teeth                                   # or: make teeth ONLY=naive-floor,no-compare-and-set

mutations.py  what is broken, by which words of the source, and which tests must notice
copy.py       a copy of the working tree; the mutation in it; pytest on it, and what its result means
"""
