"""The paper's tables and studies."""
