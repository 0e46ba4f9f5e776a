"""One operator, one file: docstring, reference, schema, registration, autograd, fake implementation."""
