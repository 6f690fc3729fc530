"""What a trained model is worth: likelihoods, answers and tasks, behind ``unmask eval``.

:mod:`subject` is a model folder made ready to be asked, :mod:`likelihood` the evidence bound of documents,
:mod:`perplexity` that of a data set, :mod:`curve` quality against tokens per forward. :mod:`harness` is the
model as lm-evaluation-harness asks for one; :mod:`tasks` are tasks whose data come in packages, and
:mod:`sandbox` is where their programs run. Every random number follows from one seed.
"""
