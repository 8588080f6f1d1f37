"""Python clients, without JAX or TensorFlow, and a model in this process."""
