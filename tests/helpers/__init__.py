"""What tests share: independent references, builders of states, comparisons."""
