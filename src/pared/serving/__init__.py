"""What maintained engines read: folders as they are, and exports of models in their own forms."""
