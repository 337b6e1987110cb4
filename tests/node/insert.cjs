// Events from another language: plain INSERTs, in the transaction of the data. node insert.cjs URL TOPIC PREFIX
const postgres = require("postgres");

const [url, topic, aggregate] = process.argv.slice(2);
const sql = postgres(url, { max: 1 });
const headers = { "content-type": "application/json", tenant: "acme" };

function pay(tx, id) {
  return [
    tx`UPDATE orders SET state = 'PAID' WHERE id = ${id}`,
    tx`INSERT INTO outbox.outbox (type, topic, key, value, headers)
       VALUES ('shop.PAID_BY_NODE', ${topic}, ${id}, ${Buffer.from(JSON.stringify({ order: id }))}, ${tx.json(headers)})`,
    tx`INSERT INTO outbox.outboxevent (aggregatetype, aggregateid, type, payload)
       VALUES (${aggregate}, ${id}, 'PaidByNode', ${tx.json({ order: id, euro: "€" })})`,
  ];
}

async function main() {
  await sql.begin((tx) => pay(tx, 7));
  await sql
    .begin(async (tx) => {
      await Promise.all(pay(tx, 8));
      throw new Error("rolled back");
    })
    .catch((error) => {
      if (error.message !== "rolled back") throw error;
    });
  await sql.end();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
