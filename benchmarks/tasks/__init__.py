"""Six tasks on which the ways to adapt a model are compared, on data that PyPI ships.

task, methods     a task; the ways to adapt its model
training          one run, and the search for the learning rate
running           all methods on all tasks
results           JSON lines
tables, figure    the report
targets           the figures that the project aims at
command           `python -m benchmarks tasks`
data              the texts, catalogues and ratings

topics            text classification
answers           question answering
sentences         MiniLM's layers for both of them
translation       messages of programs
images            classes and denoising of digits
recommendation    ratings
language          a language model over bytes
"""
