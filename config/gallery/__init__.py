"""The pages that compare images before and after."""
