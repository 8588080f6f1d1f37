"""The Python clients. They load neither JAX nor TensorFlow."""
