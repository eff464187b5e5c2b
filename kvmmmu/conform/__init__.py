"""Truth: checks of the model against files whose answers this project did not make."""
