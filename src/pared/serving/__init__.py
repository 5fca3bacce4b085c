"""What maintained engines read: exports of models in their own forms."""
