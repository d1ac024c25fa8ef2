"""Looking at singular values: tracked, exact, drawn. Changes nothing."""
