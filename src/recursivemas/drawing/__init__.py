"""A pattern as a picture: with lines of text for a terminal, and as SVG for a page.

Both show the stages in their order, every edge with its direction, which edges carry last round's message, and who
answers; of a system also what plays each role and what each edge carries. Knows a pattern and names; knows nothing of
models or messages.
"""
