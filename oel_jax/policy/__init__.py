"""The language model as pure functions of its parameters: architecture, decoder, sampling,
tokenizer, weights.
"""
