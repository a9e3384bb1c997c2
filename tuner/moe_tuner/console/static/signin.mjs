// Changes the token of the printed address, or a typed one, for a cookie. A fragment never reaches a server by itself.
const says = document.getElementById("says");

async function signIn(token) {
  says.textContent = "Signing in …";
  try {
    const answer = await fetch("api/session", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Moestack-Console": "1" },
      body: JSON.stringify({ token }),
    });
    if (answer.ok) location.reload();
    else says.textContent = answer.status === 401 ? "This is not the token." : `Refused (${answer.status}).`;
  } catch {
    says.textContent = "No answer. Does the tuner still run?";
  }
}

const found = new URLSearchParams(location.hash.slice(1)).get("token");
// Out of the address bar and the history at once, whether it is right or not.
if (location.hash) history.replaceState(null, "", location.pathname);
if (found) signIn(found);
document.getElementById("form").addEventListener("submit", (event) => {
  event.preventDefault();
  signIn(document.getElementById("token").value.trim());
});
