"""What is fed to a model: text, pictures, chats and questions."""
